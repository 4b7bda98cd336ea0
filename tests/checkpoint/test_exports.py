"""Folders that are exported: the old model or the new one, whenever the process is killed; other files stay."""

import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspeed_sdp import files
from deepspeed_sdp.checkpoint import model_folder
from deepspeed_sdp.checkpoint.export import export
from deepspeed_sdp.checkpoint.universal_export import export_universal
from tests.support.crashes import crashes
from tests.support.tiny_checkpoint import tensors, write_tiny


def write_model(out, content, names):
    with model_folder(out) as staging:
        for name in names:
            (staging / name).write_text(content)


def loaded(out):
    """Contents of the files that ``from_pretrained`` would read; ``None`` where it would not, without a config."""
    if not (out / "config.json").exists():
        return None
    weights = [out / "model.safetensors"]
    if not weights[0].exists():
        weights = [out / "model.safetensors.index.json", *out.glob("model-*.safetensors")]
    return {path.read_text() for path in ((out / "config.json"), *weights)}


ONE = ["config.json", "model.safetensors"]
TWO = [
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]
THREE = [name.replace("of-00002", "of-00003") for name in TWO] + ["model-00003-of-00003.safetensors"]


@pytest.mark.parametrize("way", ["exchange", "renames", "filled"])
@pytest.mark.parametrize(("old", "new"), [(ONE, ONE), (ONE, TWO), (TWO, ONE), (TWO, THREE), (TWO, TWO)])
def test_a_kill_at_any_call_never_mixes_two_models(tmp_path, monkeypatch, way, old, new):
    if way != "exchange":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    states = []
    for number, crash in enumerate(crashes(monkeypatch)):
        out = tmp_path / str(number) / "hf"
        write_model(out, "old", old)
        (out / "tokenizer.json").write_text("of the user")
        if way == "filled":
            (out / "checkpoint-1").mkdir()
        with crash:
            write_model(out, "new", new)
        states.append(loaded(out))
        write_model(out, "next", new)
        assert loaded(out) == {"next"}
        others = {"checkpoint-1"} if way == "filled" else set()
        assert set(os.listdir(out)) == {*new, *others, "tokenizer.json"}
        assert os.listdir(out.parent) == ["hf"]
        assert (out / "tokenizer.json").read_text() == "of the user"
        shutil.rmtree(out.parent)
    # Where folders cannot be exchanged, there is none to load for a moment.
    assert [state for state in states if state not in ({"old"}, {"new"})] == [None] * states.count(None)
    assert (None in states) == (way != "exchange")
    assert {"old"} in states
    assert {"new"} in states


def test_where_the_process_stands_is_not_taken_from_under_it(tmp_path, monkeypatch):
    write_model(tmp_path, "old", TWO)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path, "new", ONE)
    assert sorted(os.listdir()) == ONE


def test_files_have_the_modes_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint = write_tiny(tmp_path / "c")
        export(checkpoint, tmp_path / "hf")
        export(checkpoint, tmp_path / "parts", shard_bytes=1000)
        export_universal(checkpoint, tmp_path / "universal")
    finally:
        os.umask(before)
    for path in (tmp_path / name for name in ("hf", "parts", "universal")):
        for found in (path, *path.rglob("*")):
            assert found.stat().st_mode & 0o777 == (0o750 if found.is_dir() else 0o640), found


def test_a_killed_universal_export_leaves_the_older_one_or_the_new_one(tmp_path, monkeypatch):
    folder, out = tmp_path / "c", tmp_path / "out"
    export_universal(write_tiny(folder, steps=3), out)
    old = state_of(out)
    export_universal(write_tiny(folder, steps=4), tmp_path / "other")
    new = state_of(tmp_path / "other")
    assert old != new
    for crash in crashes(monkeypatch, most=2000, stride=11):
        with crash:
            export_universal(folder / "t", out)
        assert state_of(out) in (old, new)
    export_universal(folder / "t", out)
    assert state_of(out) == new
    assert sorted(os.listdir(out)) == ["latest_universal", "t"]


def state_of(universal):
    """Of a universal checkpoint: the names of its files, and its step."""
    checkpoint = universal / (universal / "latest_universal").read_text()
    job = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=True)
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")), job["global_steps"]


def test_an_exported_folder_loads_and_an_older_one_leaves_no_weights_in_it(tmp_path):
    checkpoint = write_tiny(tmp_path / "c")
    export(checkpoint, tmp_path / "hf", shard_bytes=1000)
    export(checkpoint, tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").glob("*.safetensors*")} == {"model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(value, tensors()[f"master.{name}"]) for name, value in model.named_parameters())
