"""The examples as their users start them: run_clm.py under DeepSpeed's launcher, a loop under accelerate's."""

import difflib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import chain

import datasets
import pytest
from safetensors.torch import load_file

from deepspeed_sdp.data import train_tokenizer
from tests.data.conftest import make_documents
from tests.launch.jobs import run_job, run_launcher
from tests.support.ranks import ROOT, free_port, rank_environment

SCRIPT = ROOT / "examples" / "run_clm.py"
OVERRIDES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BLOCKS, SIZE = 16, 32

# Runs where the package cannot be imported, and cuts the text by itself.
LOSS = """
import sys
sys.modules["deepspeed_sdp"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, blocks, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert model.config.eos_token_id == tokenizer.eos_token_id
ids = torch.tensor([i for line in open(text) for i in tokenizer(line).input_ids][: blocks * size]).view(blocks, size)
with torch.no_grad():
    print(float(model(input_ids=ids, labels=ids).loss))
"""


class Place:
    """A folder with text and a tokenizer; ``launch`` trains there, going on from the last checkpoint."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        self.output = folder / "out"
        self.tokenizer = tokenizer
        for name, count, seed in (("train.jsonl", 60, 0), ("validation.txt", 20, 1)):
            documents = make_documents(count, seed)
            lines = map(json.dumps, ({"text": d} for d in documents)) if name.endswith("jsonl") else documents
            (folder / name).write_text("\n".join(lines))

    def launch(self, max_steps, launcher="deepspeed"):
        options = {
            "deepspeed": ROOT / "ds_configs" / "hf_sdp.json",
            "model_type": "llama",
            "config_overrides": ",".join(f"{key}={value}" for key, value in OVERRIDES.items()),
            "tokenizer_name": self.tokenizer,
            "train_file": self.folder / "train.jsonl",
            "validation_file": self.folder / "validation.txt",
            "block_size": SIZE,
            "max_eval_samples": BLOCKS,
            "output_dir": self.output,
            "max_steps": max_steps,
            "save_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "report_to": "none",
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        command = [SCRIPT, "--do_train", "--do_eval", "--use_cpu", *arguments]
        if launcher == "deepspeed":
            return run_job(command, cwd=self.folder)
        return run_launcher(launcher, command, self.folder, free_port(), ranks=1)

    def loss(self):
        """Of the saved model on the validation blocks, without this package."""
        done = subprocess.run(
            [sys.executable, "-c", LOSS, self.output, self.folder / "validation.txt", str(BLOCKS), str(SIZE)],
            env=rank_environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout.splitlines()[-1])

    def read(self, name):
        return json.loads((self.output / name).read_text())


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """What datasets keeps goes where the tests' files go."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_HOME", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(make_documents(60), 320, tmp_path_factory.mktemp("tokenizer") / "saved")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("clm")
    tokenizer.save_pretrained(folder / "tokenizer")
    place = Place(folder, folder / "tokenizer")
    job = place.launch(max_steps=3)
    assert job.code == 0, job.output
    assert job.left == []
    return place


def test_without_a_launcher_one_process_trains_the_whole_model(tmp_path, trained):
    place = Place(tmp_path, trained.tokenizer)
    job = place.launch(max_steps=2, launcher="python")
    assert job.code == 0, job.output
    assert job.output.count("a world of one rank trains the whole model") == 1
    assert place.read("all_results.json")["eval_loss"] == pytest.approx(place.loss(), abs=1e-3)


def test_it_leaves_the_model_that_it_evaluated(trained):
    metrics = trained.read("all_results.json")
    assert metrics["eval_loss"] == pytest.approx(trained.loss(), abs=1e-3)
    assert metrics["perplexity"] == pytest.approx(2.718281828 ** metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_samples"] == BLOCKS
    assert metrics["train_samples"] > BLOCKS
    state = trained.read("trainer_state.json")
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 3 == state["global_step"]
    assert losses[-1] < losses[0] - 0.1
    assert trained.read("checkpoint-3/global_step3/meta.json")


@pytest.mark.slow
def test_the_same_command_with_more_steps_goes_on(trained, tmp_path):
    place = Place(tmp_path, trained.tokenizer)
    shutil.copytree(trained.output, place.output)
    job = place.launch(max_steps=6)
    assert job.code == 0, job.output
    before, after = (p.read("trainer_state.json")["log_history"] for p in (trained, place))
    steps = [entry for entry in after if "loss" in entry]
    assert steps[:3] == [entry for entry in before if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[3]["loss"] < steps[2]["loss"] + 0.1
    losses = [p.read("eval_results.json")["eval_loss"] for p in (trained, place)]
    assert losses[1] < losses[0] - 0.1
    assert losses[1] == pytest.approx(place.loss(), abs=1e-3)


def test_one_line_is_what_sdp_changes():
    ours = SCRIPT.read_text()
    plain = ours.replace("from deepspeed_sdp.hf import SDPTrainer as Trainer", "from transformers import Trainer")
    compile(plain, "plain", "exec")
    assert "deepspeed_sdp" not in plain
    changed = [
        line
        for line in difflib.unified_diff(plain.splitlines(), ours.splitlines(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    shown = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [block.splitlines() for block in shown] == [changed]


MODEL = ["--model_type", "llama", "--tokenizer_name", "tokenizer"]
MISTAKES = {
    "no model": (["--train_file", "a.txt"], "--model_name_or_path, or --config_name or --model_type"),
    "no tokenizer": (["--model_type", "llama", "--train_file", "a.txt"], "takes --tokenizer_name"),
    "overrides": (
        ["--model_name_or_path", "m", "--config_overrides", "vocab_size=3", "--train_file", "a.txt"],
        "without --model_name_or_path",
    ),
    "no text": (MODEL, "--train_file, --validation_file"),
    "suffix": ([*MODEL, "--train_file", "a.md"], "a.md: takes .txt, .json, .jsonl, .csv"),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_clm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_clm"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_options(script, monkeypatch, mistake):
    options, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *options])
    with pytest.raises(ValueError, match=re.escape(message)):
        script.main()


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv"])
def test_all_kinds_of_text(script, tokenizer, tmp_path, kind):
    documents = make_documents(40)
    file = tmp_path / f"text.{kind}"
    rows = [{"text": document} for document in documents]
    content = {
        "txt": "\n".join(documents),
        "json": json.dumps(rows),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": "\n".join(["text", *documents]),
    }
    file.write_text(content[kind])
    data = script.DataArguments(train_file=str(file), validation_split_percentage=25)
    parts = {part: script.load_text(data, part) for part in ("train", "validation")}
    assert [len(rows) for rows in parts.values()] == [30, 10]
    blocks = script.cut_into_blocks(parts["train"], tokenizer, 8, None, None)
    end = "\n" if kind == "txt" else ""
    ids = [i for document in documents[10:] for i in tokenizer(document + end).input_ids]
    assert list(chain(*blocks["input_ids"]))[:400] == ids[:400]
    assert blocks["labels"][:3] == blocks["input_ids"][:3]
    assert len(script.cut_into_blocks(parts["train"], tokenizer, 8, 5, None)) == 5
    with pytest.raises(ValueError, match="30 rows of text hold no block of 1000000 tokens"):
        script.cut_into_blocks(parts["train"], tokenizer, 1_000_000, None, None)


@pytest.mark.slow
def test_a_loop_under_accelerate_launch(tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        (ROOT / "ds_configs" / "accelerate.yaml").read_text().replace("ds_configs/", f"{ROOT}/ds_configs/")
    )
    port = free_port()
    switches = ["--config_file", config, "--num_processes", 2, "--main_process_port", port]
    job = run_launcher(
        "accelerate", ["launch", *switches, ROOT / "examples" / "accelerate_loop.py"], cwd=tmp_path, port=port
    )
    assert job.code == 0, job.output
    assert job.left == []
    (loss,) = re.findall(r"^loss (.*)$", job.output, re.MULTILINE)
    assert float(loss) < 4.0  # it began at log(256)
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed_sdp.cli", "export", "runs/accelerate/state", "exported"],
        env=rank_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    saved, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("runs/accelerate", "exported"))
    assert saved.keys() == exported.keys()
    assert all(saved[name].equal(exported[name]) for name in saved)
