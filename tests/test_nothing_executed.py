"""What a folder of a model, tokenizer or data set holds is read, never executed, and nobody is asked whether to."""

import ast
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from deepspeed_sdp.checkpoint.reading import load_state
from deepspeed_sdp.data import ShardOptions, SourceSpec, load_tokenizer, open_shards, prepare_shards
from deepspeed_sdp.data.heldout import HeldoutSequences
from deepspeed_sdp.errors import CheckpointError, ConfigError, DataError
from deepspeed_sdp.pretraining.job import model_config
from deepspeed_sdp.subnetwork import meta_model, read_model_config
from tests.data.conftest import make_documents
from tests.support.ranks import ROOT, free_port, rank_environment

# Methods of transformers that may run a folder's code.
LOADERS = {"from_pretrained", "from_config"}


def calls(names):
    """Place and node of every call of these methods, also by another name that a file gives them."""
    for folder in ("deepspeed_sdp", "launch", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if not any(name in text for name in names):
                continue
            tree = ast.parse(text)
            aliases = {
                target.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign | ast.AnnAssign)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr in names
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _called(node.func) in names | aliases:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def _called(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def test_every_loader_is_told_not_to_run_code():
    found = list(calls(LOADERS))
    assert len(found) > 5
    for place, node in found:
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        said = getattr(given.get("trust_remote_code"), "value", None)
        assert said is False, f"{place}: takes trust_remote_code=False"


def test_every_load_of_torch_and_numpy_unpickles_nothing():
    for place, node in calls({"load"}):
        owner = getattr(getattr(node.func, "value", None), "id", None)
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if owner == "torch":
            assert given.get("weights_only") is True, place
        assert owner not in ("pickle", "cloudpickle", "dill", "joblib"), place
        if owner == "np":
            assert given.get("allow_pickle") is False, place


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


def hostile(folder, mark, model_type):
    """A folder whose code, which its JSON files name, leaves ``mark``."""
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w').close()\nclass Any: pass\n"
    for name in ("evil.py", f"{folder.name}.py"):
        (folder / name).write_text(code)
    autos = {"AutoConfig": "evil.Any", "AutoModelForCausalLM": "evil.Any", "AutoTokenizer": ["evil.Any", "evil.Any"]}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": model_type, "auto_map": autos, **sizes, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Any", "auto_map": autos}))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    return folder


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def no_answers(monkeypatch):
    def ask(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", ask)


def test_a_hostile_model_folder(tmp_path, mark, no_answers):
    unknown = hostile(tmp_path / "unknown", mark, "evil")
    with pytest.raises(ConfigError, match=r"--model: .*unknown.*custom code") as error:
        read_model_config(unknown)
    assert "\n" not in str(error.value)
    # A family that transformers knows is built from its own code.
    known = hostile(tmp_path / "known", mark, "llama")
    assert type(meta_model(read_model_config(known))).__module__.startswith("transformers.models.llama")
    assert model_config(known, 64, None).vocab_size == 320
    assert not mark.exists()


def test_a_hostile_tokenizer_folder(tmp_path, mark, no_answers):
    folder = hostile(tmp_path / "tokenizer", mark, "evil")
    for name in ("tokenizer.json", "tokenizer.model", "vocab.pkl", "added_tokens.json"):
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError, match=r"--tokenizer: .*custom code") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="custom code"):
        prepare_shards(tmp_path / "cache", ShardOptions(SourceSpec(("builtin",)), str(folder)), workers=1)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="--tokenizer"):
        load_tokenizer(folder)
    assert not mark.exists()


def test_pickles_in_the_place_of_numbers(tmp_path, mark):
    (tmp_path / "text.txt").write_text("\n\n\n".join(make_documents(60)))
    options = ShardOptions(SourceSpec((str(tmp_path / "text.txt"),)), train_tokenizer=320, heldout_fraction=0.1)
    prepare_shards(tmp_path / "cache", options, workers=1)
    pickled = pickle.dumps(Evil(mark))
    with (tmp_path / "cache" / "train-00000.bin").open("r+b") as file:
        file.write(pickled)
    with pytest.raises(DataError, match=r"train-00000.bin: holds the id"):
        open_shards(tmp_path / "cache").sequences("train", 32)[0]
    with (tmp_path / "heldout.npz").open("wb") as file:
        np.savez(file, ids=np.array([Evil(mark)], dtype=object), starts=np.zeros(1), about=np.array("{}"))
    assert HeldoutSequences.load(tmp_path / "heldout.npz", {"count": 1, "seq_length": 8}) is None
    torch.save({"state": Evil(mark)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_state(tmp_path)
    assert not mark.exists()


JOB = """
import sys
from deepspeed_sdp.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(arguments, folder):
    """A command with a yes on its input for whoever asks; its output on one line."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**rank_environment(), "HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "datasets")},
        input="y\n" * 20,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )


def test_a_yes_on_the_input_is_not_read(tmp_path, mark):
    folder = hostile(tmp_path / "evil", mark, "evil")
    (tmp_path / "a.jsonl").write_text('{"text": "the red cat walks"}\n' * 20)
    done = run(["-c", JOB, "data", "out", "--source", "a.jsonl", "--tokenizer", folder], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "custom code" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_a_data_set_with_a_loading_script_runs_nothing(tmp_path, mark):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "the red cat walks"}\n')
    code = "from datasets import load_dataset_builder as load\nprint(load(sys.argv[1]))"
    done = run(["-c", f"import sys\n{code}", tmp_path / "set"], tmp_path)
    assert "[y/N]" not in done.stdout + done.stderr
    assert not mark.exists(), os.listdir(tmp_path)


DENSE = """
import os, sys, torch, deepspeed
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from deepspeed_sdp.engine import initialize_dense
from deepspeed_sdp.errors import CheckpointError

class Evil:
    def __reduce__(self):
        return open, (sys.argv[1], "w")

def make(stage, bf16):
    with torch.device("meta"):
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    zero = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    return initialize_dense(model, {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, **zero})

deepspeed.init_distributed("gloo")
for stage, bf16 in ((0, False), (1, False), (2, True)):
    engine, folder = make(stage, bf16), f"stage-{stage}"
    ids = torch.zeros(1, 8, dtype=torch.int64)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(folder, client_state={"report": {"losses": [1.0]}})
    assert make(stage, bf16).load_checkpoint(folder)[1]["report"] == {"losses": [1.0]}
    for file in Path(folder, "global_step1").glob("*model_states.pt"):
        torch.save({**torch.load(file, weights_only=False), "more": Evil()}, file)
    try:
        make(stage, bf16).load_checkpoint(folder)
    except CheckpointError as error:
        print(error)
"""


def test_checkpoints_of_the_dense_baseline_hold_plain_data_alone(tmp_path, mark):
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**rank_environment(), **rank, "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", DENSE, str(mark)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is refused: its files hold more than plain data") == 3
    assert not mark.exists()
