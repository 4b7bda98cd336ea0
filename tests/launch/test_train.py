"""A whole run through the real launcher, and what it leaves behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deepspeed_sdp.data import open_shards
from tests.launch.jobs import Workplace
from tests.support.ranks import rank_environment

# Runs where the package cannot be imported: what a run leaves is an ordinary HuggingFace folder.
EVALUATE = """
import json, sys
sys.modules["deepspeed_sdp"] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, heldout = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.from_numpy(np.load(heldout).astype(np.int64))
with torch.no_grad():
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten())
    made = model.generate(**tokenizer("the cat", return_tensors="pt", return_token_type_ids=False),
                          max_new_tokens=12, do_sample=False)
print(json.dumps({"loss": float(loss), "text": tokenizer.decode(made[0]), "vocab": model.config.vocab_size,
                  "tokenizer": len(tokenizer), "class": type(model).__name__,
                  "eos": [model.config.eos_token_id, tokenizer.eos_token_id]}))
"""


def heldout_of(output):
    sequences = open_shards(output / "data").sequences("heldout", 32)
    return sequences.ids(range(len(sequences)))


def evaluate(output):
    np.save(output / "heldout.npy", heldout_of(output))
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(output / "hf"), str(output / "heldout.npy")],
        env=rank_environment(),
        cwd=output,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workplace = Workplace(tmp_path_factory.mktemp("job"))
    job = workplace.launch("--compare_dense", steps=12, eval_interval=5, eval_sequences=8)
    assert job.code == 0, job.output
    return workplace, job


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run[0].output / "report.json").read_text())


def test_the_files_it_leaves(run):
    output = run[0].output
    assert {entry.name for entry in output.iterdir()} == {
        "data",
        "hf",
        "loss.png",
        "metrics.jsonl",
        "plan.png",
        "report.json",
        "report.md",
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {entry.name for entry in (output / "hf").iterdir()}
    for name in ("loss.png", "plan.png"):
        with Image.open(output / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_it_ends_cleanly_and_says_what_it_did_once(run, report):
    job = run[1]
    assert job.left == []
    assert "Traceback" not in job.output
    assert job.errors == []
    assert job.output.count(f"{report['full_model_val_loss']:.3f} nats per token") == 1


def test_the_figures(report):
    assert (report["steps"], report["tokens"]) == (12, 12 * 2 * 4 * 32)
    assert [point["step"] for point in report["history"]["full_model_val_loss"]] == [5, 10, 12]
    assert [point["step"] for point in report["history"]["train_loss"]] == [10, 12]
    losses = [point["loss"] for point in report["history"]["full_model_val_loss"]]
    assert losses[-1] < losses[0] < 5.9, "it learns, from about ln 320"
    sizes = report["per_rank_model_state_bytes"]
    assert len(sizes["sdp"]) == len(sizes["dense"]) == len(report["bytes_sent_per_step_per_rank"]) == 2
    for sdp, dense in zip(sizes["sdp"], sizes["dense"], strict=True):
        assert sdp["total"] == sdp["weights"] + sdp["gradients"] + sdp["optimizer"]
        assert sdp["total"] < dense["total"]
    assert min(report["bytes_sent_per_step_per_rank"]) > 0
    assert report["reduce_bucket_numel"] == 5_000_000, "of both: DeepSpeed's own default is another"
    assert report["parameters_per_worker"] == report["owned_parameters_per_rank"]


def test_the_page_agrees_with_the_data(run, report):
    page = (run[0].output / "report.md").read_text()
    assert "Both with `reduce_bucket_size` 5,000,000 elements: the largest rank holds 0." in page
    assert {name: run[1].output.count(f"{name:<12} {text}\n") for name, text in report["run"].items()} == dict.fromkeys(
        report["run"], 1
    )
    assert f"| validation loss (full model) | {report['full_model_val_loss']:.4f} |" in page
    assert f"| steps, tokens | {report['steps']:,}, {report['tokens']:,} |" in page


def test_the_model_is_an_ordinary_one_with_the_reported_loss(run, report):
    output = run[0].output
    heldout = heldout_of(output)
    assert len(heldout) % 2 or len(heldout) % 8, "ranks or batches are unequal, which is the harder case"
    found = evaluate(output)
    assert found["loss"] == pytest.approx(report["full_model_val_loss"], abs=1e-4)
    assert found["text"].startswith("the cat")
    assert len(found["text"]) > len("the cat")
    assert found["vocab"] == found["tokenizer"] == 320
    assert found["class"] == "LlamaForCausalLM"
    assert found["eos"][0] == found["eos"][1]


@pytest.mark.slow
def test_again_in_the_same_folder(run):
    workplace, _ = run
    prepared = (workplace.output / "data" / "manifest.json").stat().st_mtime_ns
    before = json.loads((workplace.output / "report.json").read_text())
    job = workplace.launch(steps=20, eval_interval=50)
    assert job.code == 0, job.output
    after = json.loads((workplace.output / "report.json").read_text())
    assert (before["steps"], after["steps"]) == (12, 20)
    assert (workplace.output / "data" / "manifest.json").stat().st_mtime_ns == prepared, (
        "the text is not prepared again"
    )
    assert evaluate(workplace.output)["loss"] == pytest.approx(after["full_model_val_loss"], abs=1e-4)


@pytest.mark.slow
def test_block_inside_the_deepspeed_config_own_tokenizer_and_jsonl(run, workplace):
    from tests.data.conftest import make_documents
    from tests.launch.jobs import DEEPSPEED, SDP

    workplace.write("ds.json", json.dumps({**DEEPSPEED, "subnetwork_data_parallel": SDP}))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_documents(80))
    job = workplace.launch(
        sdp_config=None,
        text=workplace.write("rows.jsonl", rows),
        tokenizer=run[0].output / "data" / "tokenizer",
        cache=workplace.folder / "cache",
        steps=None,
        tokens="1000",
    )
    assert job.code == 0, job.output
    report = json.loads((workplace.output / "report.json").read_text())
    assert report["steps"] == round(1000 / (2 * 4 * 32))
    assert not (workplace.output / "data").exists()
