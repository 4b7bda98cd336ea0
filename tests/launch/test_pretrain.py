"""Recipes from parquet files to an exported model, in real jobs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from deepspeed_sdp.cli import main
from deepspeed_sdp.data import open_shards, separate_documents
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.report import plan_summary
from tests.launch.jobs import assert_ended_badly
from tests.launch.recipe_jobs import RecipePlace

STOP_AT_5 = """
import signal, time
step = loop.train_step
def stopping(engine, batches):
    loss = step(engine, batches)
    if engine.global_steps == 5 and engine.global_rank == 1:
        os.kill(os.getpid(), signal.{})
        time.sleep(1)
    return loss
loop.train_step = stopping
"""
# Ranks split a step's text for the calibration, so its scale is another's on other ranks.
UNSCALED = {"sdp.calibration_sequences": 0}
# Restarts of attention at documents reach every layer of the evaluation.
CHANGES = {"data.document_reset": "attention", "logging.checkpoint_interval": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return RecipePlace(tmp_path_factory.mktemp("recipe"))


SLEEP = 1.0
SLOW_EVALUATION = f"""
import time
evaluate = loop.Loop._evaluate
def slow(self, step, *arguments):
    time.sleep({SLEEP})
    if self.engine.global_rank == 0:
        with open("plan.json", "w") as file:
            file.write(self.engine.plan.to_json())
    return evaluate(self, step, *arguments)
loop.Loop._evaluate = slow
"""


@pytest.fixture(scope="module")
def run(place):
    job = place.launch("--tensorboard", "--peak_tflops", "0.1", script=place.script(SLOW_EVALUATION), **CHANGES)
    assert job.code == 0, job.output
    return job


def weights(place):
    return load_file(place.output / "hf" / "model.safetensors")


def test_it_says_what_it_will_do(run, place):
    page = (place.output / "report.md").read_text()
    for text in (
        "matched by flops: 12 steps",
        "SDP, forward masking by neuron, 2 subnetworks",
        "warm-up 1 steps, to the end of 12",
    ):
        assert run.output.count(text) == 1, run.output
        assert text in page


def test_the_figures_of_a_run(run, place):
    lines = place.lines()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "full_model_val_loss" in line] == [4, 8, 12]
    # The first two steps compile and are measured: what is of time is not known of them.
    assert steps[0]["tokens_per_second"] is steps[0]["seconds_per_step"] is steps[0]["mfu"] is None
    for line in steps[1:]:
        assert line["tokens"] == line["step"] * 16 * 32
        assert line["tokens_per_second"] == pytest.approx(sum(line["tokens_per_second_per_rank"]), rel=1e-3)
        assert line["tokens_per_second"] == pytest.approx(16 * 32 / line["seconds_per_step"], rel=0.5)
        assert line["mfu"] == pytest.approx(line["flops"] / line["step"] / 2 / line["seconds_per_step"] / 1e11, rel=0.5)
        assert len(line["memory_bytes_per_rank"]) == 2
        assert min(line["memory_bytes_per_rank"]) > 1e8
        assert line["bytes_sent_per_step"] > 0
        assert line["grad_norm"] > 0
        assert set(line["seconds"]) == {"data", "forward", "backward", "step", "communication", "exposed"}
        assert 0 < line["seconds"]["backward"] < line["seconds_per_step"] * 1.5
    assert steps[-1]["learning_rate"] < steps[1]["learning_rate"], "the schedule ends with the run"
    assert steps[-1]["loss"] < steps[0]["loss"]
    for line in lines:
        if "full_model_val_loss" in line:
            assert line["full_model_val_perplexity"] == pytest.approx(math.exp(line["full_model_val_loss"]), rel=1e-5)


def test_console_report_and_metrics_say_the_same(run, place):
    """Of the model as it was before it was cut, and of the parts that its workers really have."""
    data, page = json.loads((place.output / "report.json").read_text()), (place.output / "report.md").read_text()
    saved = sum(value.numel() for name, value in weights(place).items() if name != "lm_head.weight")
    assert data["parameters"] == saved
    assert data["parameters_per_worker"] == data["owned_parameters_per_rank"]
    assert 0.5 * saved < max(data["parameters_per_worker"]) < saved
    summary = plan_summary(SubnetworkPlan.from_json((place.folder / "plan.json").read_text()), saved)
    assert summary["bytes_per_worker"] == [2 * numel for numel in data["parameters_per_worker"]]
    assert data["plan"].items() <= json.loads(json.dumps(summary)).items()
    # The console's lines are the report's, word for word.
    assert {name: run.output.count(f"{name:<12} {text}\n") for name, text in data["run"].items()} == dict.fromkeys(
        data["run"], 1
    )
    assert all(f"| {name} | {text} |" in page for name, text in data["run"].items())
    most = max(data["parameters_per_worker"])
    assert f"each worker trains {most / 1e6:,.1f} M parameters ({most / saved:.0%})" in run.output
    last = [line for line in place.lines() if "loss" in line][-1]
    assert (last["step"], last["tokens"]) == (data["steps"], data["tokens"])
    assert last["flops"] == pytest.approx(data["flops"], rel=1e-6)
    assert data["flops"] == pytest.approx(data["tokens"] * sum(data["flops_per_token"]) / 2)
    assert last["loss"] == pytest.approx(data["train_loss"], rel=1e-6)
    assert place.lines()[-1]["full_model_val_loss"] == pytest.approx(data["full_model_val_loss"], rel=1e-6)


def test_tokens_per_second_are_those_of_training_steps_alone(run, place):
    """Evaluations of this job sleep a second each, which is more than all of its steps take."""
    lines = [line for line in place.lines() if "loss" in line]
    data = json.loads((place.output / "report.json").read_text())
    assert data["timed_steps"] == data["steps"] - 2
    seconds = sum(2 * line["seconds_per_step"] for line in lines[1:])
    assert data["tokens_per_second"] == pytest.approx(data["timed_steps"] * 16 * 32 / seconds, rel=1e-3)
    assert data["seconds"] > seconds + 3 * SLEEP
    assert (
        f"| tokens/s of training steps | {data['tokens_per_second']:,.0f} |" in (place.output / "report.md").read_text()
    )


def test_tensorboard_has_them_too(run, place):
    events = EventAccumulator(str(place.output / "tensorboard"))
    events.Reload()
    last = place.lines()[-1]
    assert events.Scalars("Train/Samples/full_model_val_loss")[-1].value == pytest.approx(last["full_model_val_loss"])
    tags = {tag.removeprefix("Train/Samples/") for tag in events.Tags()["scalars"]}
    assert {"loss", "mfu", "tokens_per_second", "memory_bytes_largest_rank", "bytes_sent_per_step", "grad_norm",
            "seconds_backward", "full_model_val_perplexity"} <= tags  # fmt: skip


@torch.no_grad()
def test_the_exported_model_has_the_reported_loss(run, place):
    model = AutoModelForCausalLM.from_pretrained(place.output / "hf", dtype=torch.float32).eval()
    assert model.config.use_cache
    separate_documents(model.config, "attention", 1)
    heldout = open_shards(place.shards).sequences("heldout", 32, "attention")
    total = count = 0.0
    for i in range(len(heldout)):
        example = {key: value[None] for key, value in heldout[i].items()}
        predicted = int((example["labels"][:, 1:] != -100).sum())
        total += float(model(**example).loss) * predicted
        count += predicted
    report = json.loads((place.output / "report.json").read_text())
    assert report["full_model_val_loss"] == pytest.approx(total / count, abs=1e-4)


def test_the_last_step_has_a_checkpoint_which_is_the_final_model(run, place, tmp_path):
    checkpoints = place.output / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} - {"latest"} == {f"global_step{n}" for n in (10, 12)}
    assert main(["export", str(checkpoints), str(tmp_path / "hf")]) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    final = weights(place)
    assert set(exported) == set(final)
    assert all(exported[name].equal(final[name]) for name in final)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [{}, {"sdp.masking": "backward", "sdp.granularity": "layer"}, {"sdp.enabled": False}],
    ids=["forward-neuron", "backward-layer", "dense"],
)
@pytest.mark.parametrize("signal", ["SIGUSR1", "SIGKILL"])
def test_killed_and_resumed_it_ends_with_the_same_weights(place, tmp_path, method, signal):
    options = {
        **method,
        "logging.checkpoint_interval": 3,
        "data.document_reset": "attention",
        "model.activation_checkpointing": True,
    }
    whole, cut = RecipePlace(tmp_path / "whole", place.shards), RecipePlace(tmp_path / "cut", place.shards)
    job = whole.launch(**options)
    assert job.code == 0, job.output
    marker = cut.folder / "stopped"
    first = cut.launch("--stop_file", marker, script=cut.script(STOP_AT_5.format(signal)), **options)
    was_asked = signal == "SIGUSR1"
    assert ("; the same command goes on" in first.output) == was_asked, first.output
    assert (first.code == 0) == marker.exists() == was_asked, first.output
    assert not (cut.output / "hf").exists()
    second = cut.launch(**options)
    assert second.code == 0, second.output
    assert second.output.count("going on from") == 1
    one, two = weights(whole), weights(cut)
    assert set(one) == set(two)
    assert all(one[name].equal(two[name]) for name in one)
    # Beside the lines of the run, one of the step at which it was asked to stop.
    steps = [(line["step"], line.get("full_model_val_loss")) for line in cut.lines() if line["step"] not in (5, 7)]
    assert steps == [(line["step"], line.get("full_model_val_loss")) for line in whole.lines()], "no line twice"
    again = cut.launch(**options, **{"data.seed": 5})
    assert_ended_badly(again, "text: the checkpoint was made with another seed (0), this is 5")
    assert all(two[name].equal(value) for name, value in weights(cut).items())
    lines = cut.lines()
    finished = cut.launch("--steps", str(lines[-1]["step"]), **{**options, "logging.checkpoint_interval": 0})
    if lines[-1]["step"] % 3 == 0:
        assert (finished.code, finished.output.count("finished before:")) == (0, 1), finished.output
        assert cut.lines() == lines
        assert_ended_badly(cut.launch("--steps", "4", **options), "length.steps: got 4; the run in")


@pytest.mark.slow
def test_it_goes_on_on_another_number_of_ranks(place, tmp_path):
    """The same samples in the same steps, for each worker: the weights differ by rounding only."""
    whole, cut = RecipePlace(tmp_path / "whole", place.shards), RecipePlace(tmp_path / "cut", place.shards)
    assert whole.launch(**UNSCALED).code == 0
    first = cut.launch(script=cut.script(STOP_AT_5.format("SIGUSR1")), **UNSCALED)
    assert first.code == 0, first.output
    second = cut.launch(ranks=4, **UNSCALED)
    assert second.code == 0, second.output
    one, two = weights(whole), weights(cut)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-4
    assert any(not one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_the_dense_baseline_starts_from_the_same_weights(place, tmp_path):
    """Subnetworks that own everything, and plain DeepSpeed, are the same run."""
    dense = RecipePlace(tmp_path / "dense", place.shards)
    full = RecipePlace(tmp_path / "full", place.shards)
    assert dense.launch(**{"sdp.enabled": False}).code == 0
    assert full.launch(**{"sdp.coverage": 1.0}).code == 0
    one, two = weights(dense), weights(full)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    losses = [[line["loss"] for line in place.lines() if "loss" in line] for place in (dense, full)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switches", "changes", "message"),
    [
        ([], {"data.sequence": 3}, "error: data.sequence: unknown key, got 3"),
        ([], {"deepspeed.train_batch_size": 15}, "error: train_batch_size: got 15 with 2 ranks"),
        (["--data", "nowhere"], {}, "error: nowhere"),
        (["--steps", "0"], {}, "error: length.steps: got 0; input should be greater than or equal to 1"),
        ([], {"sdp.coverage": 0.3}, "coverage: got 0.3 with 2 subnetworks"),
        ([], {"deepspeed.zero_optimization.stage": 7}, "zero_optimization"),
    ],
)
def test_a_wrong_recipe_ends_the_job_with_one_message(place, tmp_path, switches, changes, message):
    other = RecipePlace(tmp_path / "bad", place.shards)
    assert_ended_badly(other.launch(*switches, **changes), message)


def test_killed_on_the_fly_it_goes_on_on_other_ranks_and_is_exported(place, tmp_path):
    """What the README claims, in one: without shards, a rank killed on two ranks, taken up by four, it ends where an
    unbroken run ends, and its checkpoint is the model.
    """
    whole, cut = RecipePlace(tmp_path / "whole", place.shards), RecipePlace(tmp_path / "cut", place.shards)
    source = ["--stream", str(place.folder / "parquet"), "--tokenizer", str(place.shards / "tokenizer")]
    source += ["--heldout_fraction", "0.1", "--num_lanes", "4"]
    for one in (whole, cut):
        one.text = source
    changes = {**UNSCALED, "logging.checkpoint_interval": 3}
    job = whole.launch(**changes)
    assert job.code == 0, job.output
    first = cut.launch(script=cut.script(STOP_AT_5.format("SIGKILL")), **changes)
    assert first.code != 0, first.output
    assert first.left == []
    second = cut.launch(ranks=4, **changes)
    assert second.code == 0, second.output
    assert "going on from" in second.output
    one, two = weights(whole), weights(cut)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-4
    assert any(not one[name].equal(two[name]) for name in one)
    assert main(["export", str(cut.output / "checkpoints"), str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(exported[name].equal(two[name]) for name in two)
