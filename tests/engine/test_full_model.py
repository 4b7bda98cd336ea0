"""The product of a run is the full model: HuggingFace names, a folder that loads without this package."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.cases import build_model
from tests.support.ranks import rank_environment

TIED = {"tie_word_embeddings": True}

LOADER = """
import json, sys
sys.modules["deepspeed_sdp"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, dtype="auto")
assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ids = model.eval().generate(torch.tensor([[5, 6, 7]]), **options)[0].tolist()
tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
save_file({name: value.clone() for name, value in model.state_dict().items()}, sys.argv[2])
print(json.dumps({"class": type(model).__name__, "ids": ids, "tied": tied, "use_cache": model.config.use_cache}))
"""

ROWS = [
    pytest.param({"ds": {"stage": 2}}, id="llama"),
    pytest.param(
        {"family": "qwen3", "model": {**TIED, "num_key_value_heads": 1}, "ds": {"stage": 0}}, id="qwen3-tied-absent"
    ),
    pytest.param({"family": "qwen2", "ds": {"stage": 1, "bf16": True}}, id="qwen2-bf16"),
    pytest.param({"family": "llama", "model": TIED, "ds": {"stage": 3}, "meta": True}, id="stage3-tied-meta"),
    pytest.param({"family": "mistral", "dtype": torch.bfloat16, "meta": True}, id="mistral-cast-meta"),
]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "sdp",
    [
        {"coverage": 0.5},
        {"coverage": 0.75, "plan": {"chunk_multiple": 1}},
        {"num_subnetworks": 2, "coverage": 0.5},
        {"plan": {"worker_capacity": [4, 1, 1, 1]}, "coverage": 0.5},
    ],
    ids=["half", "three_quarters", "replicas", "capacity"],
)
def test_every_rank_sends_as_much_when_the_full_model_is_gathered(ranks4, sdp, stage):
    sent, *others = ranks4.run("tests.engine.face_cases:gathered_bytes", timeout=60, sdp=sdp, stage=stage)
    assert others == [sent] * 3
    # All that is partitioned reaches every rank, once, with padding.
    partitioned = sum(4 * p.numel() for name, p in build_model().named_parameters() if "_proj" in name)
    padding = 3.0 if "worker_capacity" in sdp.get("plan", {}) else 1.1
    assert 0.75 * partitioned <= sent <= padding * 0.75 * partitioned


@pytest.mark.parametrize("values", ROWS)
def test_the_folder_loads_without_the_package(ranks4, tmp_path, values):
    folder = tmp_path / "new" / "model"
    results = ranks4.run("tests.engine.face_cases:save", timeout=90, folder=str(folder), **values)
    assert [result["error"] for result in results] == [None] * 4
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "no staging folder is left behind"
    model = build_model(values.get("family", "llama"), values.get("model"))
    full = results[0]["full_own_dtype"]
    assert [(name, value.shape) for name, value in full.items()] == [
        (n, v.shape) for n, v in model.state_dict().items()
    ]
    trained = torch.bfloat16 if values.get("ds", {}).get("bf16") else torch.float32
    assert {value.dtype for value in full.values()} == {trained}

    script = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "loaded.safetensors")]
    done = subprocess.run(
        script, env=rank_environment(PYTHONPATH=""), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["class"] == type(model).__name__
    assert report["tied"] == bool((values.get("model") or {}).get("tie_word_embeddings"))
    assert report["use_cache"] is True
    assert len(report["ids"]) == 9

    saved = load_file(tmp_path / "loaded.safetensors")
    assert set(saved) == set(full)
    assert {value.dtype for value in saved.values()} == {values.get("dtype", trained)}
    config = (folder / "config.json").read_text()
    for trace in ("subnetwork", "sdp", "deepspeed", "coverage"):
        assert trace not in config.lower()
    expected = json.loads(model.config.to_json_string())
    ours = json.loads(config)
    for key in ("dtype", "architectures", "transformers_version", "use_cache"):
        expected.pop(key, None), ours.pop(key, None)
    assert ours == expected


BLOCKS = {"coverage": 0.5, "granularity": "branch"}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"sdp": {"coverage": 0.5}, "ds": {"stage": 3}}, id="llama-neurons-3"),
        pytest.param({"sdp": BLOCKS, "family": "gpt2", "model": TIED}, id="gpt2-branches"),
        pytest.param({"sdp": {"coverage": 0.5, "masking": "backward"}, "family": "gpt_neox"}, id="gpt_neox-backward"),
    ],
)
def test_the_full_model_is_the_one_that_was_given(ranks4, tmp_path, values):
    for given, *others in ranks4.run("tests.engine.face_cases:as_given", 120, folder=str(tmp_path / "hf"), **values):
        assert others == pytest.approx([given] * 4, rel=1e-5)


def test_the_saved_weights_are_those_of_the_moment(ranks4, tmp_path):
    results = ranks4.run("tests.engine.face_cases:save_twice", timeout=90, folder=str(tmp_path / "model"))
    assert results[0]["error"] is None
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert set(again) == set(results[0]["second"])
    assert all(torch.equal(value, results[0]["second"][name]) for name, value in again.items())


def unwritable(tmp_path, kind):
    if kind == "below_a_file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "model"
    if kind == "is_a_file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file"
    return "/proc/model"


@pytest.mark.parametrize("kind", ["below_a_file", "is_a_file", "proc"])
def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(ranks4, tmp_path, kind):
    folder = unwritable(tmp_path, kind)
    results = ranks4.run("tests.engine.face_cases:save", timeout=60, folder=str(folder))
    errors = {result["error"] for result in results}
    assert len(errors) == 1
    assert errors.pop().startswith(f"save_hf: cannot write {folder}: ")
    assert all(result["losses"] for result in results), "training goes on"


def test_a_save_that_breaks_off_leaves_the_older_folder_whole(ranks4, tmp_path):
    folder = tmp_path / "model"
    results = ranks4.run("tests.engine.face_cases:save_twice", timeout=60, folder=str(folder), limit=20_000)
    errors = {result["error"] for result in results}
    assert len(errors) == 1
    assert errors.pop().startswith(f"save_hf: cannot write {folder}: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == results[0]["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
