"""The real Trainer on real ranks: every habit of its users goes on working, and what it shows is the full model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspeed_sdp.checkpoint import LOCK, FolderLocks
from tests.hf.trainer_cases import HALF, Rows
from tests.support.models import tiny_model

CASES = "tests.hf.trainer_cases"
FULL = {"coverage": 1.0}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        slow(1, {}),
        (2, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "rows": 64}),
        slow(0, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
        slow(3, {}),
        slow(1, {"gradient_checkpointing": True}),
    ],
    ids=["stage1", "accumulate-clip", "cosine", "stage3", "checkpointing"],
)
def test_with_all_owners_it_is_trainer(ranks4, tmp_path, stage, values):
    one, two = (
        ranks4.run(
            f"{CASES}:train", timeout=90, folder=str(tmp_path / which), sdp=sdp, which=which, stage=stage, **values
        )
        for which, sdp in (("sdp", FULL), ("plain", None))
    )
    for sdp, plain in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert len(sdp[key]) == 3
            # Plain DeepSpeed has no norm in fp32 without ZeRO.
            assert (stage, key, plain[key]) == (0, "grad_norm", []) or sdp[key] == pytest.approx(plain[key], rel=1e-5)
        assert sdp["evaluation"] == pytest.approx(plain["evaluation"], rel=1e-5)
        assert sdp["flos"] == plain["flos"]


BACKWARD = {**HALF, "masking": "backward"}
BLOCKS = {**HALF, "granularity": "layer"}
# Saved and evaluated in the middle of a round.
LOCAL = {**HALF, "schedule": {"sync_interval": 5, "outer_optimizer": {}}}


@pytest.mark.parametrize(
    ("sdp", "stage", "evaluation"),
    [
        (HALF, 1, "gathered"),
        slow(HALF, 1, "streamed"),
        (BACKWARD, 2, "gathered"),
        slow(BACKWARD, 2, "streamed"),
        slow(BLOCKS, 3, "gathered"),
        (BLOCKS, 3, "streamed"),
        (LOCAL, 0, "gathered"),
        slow(LOCAL, 0, "streamed"),
    ],
)
def test_evaluate_and_predict_are_the_exported_models(ranks4, tmp_path, sdp, stage, evaluation):
    results = ranks4.run(
        f"{CASES}:evaluate",
        timeout=90,
        folder=str(tmp_path),
        sdp=sdp,
        stage=stage,
        evaluation=evaluation,
        eval_first=True,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor(Rows(16, seed=5).rows)
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    right = (output.logits.argmax(-1)[:, :-1] == ids[:, 1:]).float().mean()
    for result in results:
        np.testing.assert_allclose(result["logits"], output.logits.numpy(), rtol=1e-4, atol=1e-5)
        assert result["metrics"]["eval_loss"] == pytest.approx(float(output.loss), rel=1e-4)
        assert result["metrics"]["eval_accuracy"] == pytest.approx(float(right), rel=1e-5)
        assert result["metrics"]["eval_rows"] == 16
        assert result["test"]["test_loss"] == pytest.approx(float(output.loss), rel=1e-4)
        assert result["before"]["eval_loss"] != result["metrics"]["eval_loss"]


GROWING = {"schedule": {"coverage_schedule": [[0.0, 0.25], [0.75, 0.5]], "resample_interval": 1}}


@pytest.mark.parametrize(("stage", "sdp"), [(1, HALF), slow(3, HALF), (1, GROWING), slow(3, GROWING), (0, LOCAL)])
def test_resumed_to_the_bit(ranks4, tmp_path, stage, sdp):
    values = {"sdp": sdp, "stage": stage, "max_steps": 4, "rows": 20, "timeout": 90}
    whole = ranks4.run(f"{CASES}:save_and_resume", folder=str(tmp_path), **values)
    checkpoint = str(tmp_path / "checkpoint-2")
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
    resumed = ranks4.run(
        f"{CASES}:save_and_resume", folder=str(tmp_path / "b"), resume=checkpoint, model_seed=3, **values
    )
    for before, after in zip(whole, resumed, strict=True):
        assert after["step"] == 4
        assert after["loss"] == before["loss"]
        assert after["learning_rate"] == before["learning_rate"]
    assert all(torch.equal(value, resumed[0]["full"][name]) for name, value in whole[0]["full"].items())


def test_resumed_on_another_number_of_ranks(ranks4, pools, tmp_path):
    # Of other coverage the full model is calibrated to another scale, after which its weights are far from the saved.
    alone = {"coverage": 0.25, "calibration_sequences": 0}
    values = {"sdp": alone, "max_steps": 4, "rows": 64, "timeout": 90}
    whole = ranks4.run(f"{CASES}:save_and_resume", folder=str(tmp_path), **values)
    checkpoint = str(tmp_path / "checkpoint-2")
    values["sdp"] = {**HALF, "calibration_sequences": 0}
    resumed = pools(2).run(
        f"{CASES}:save_and_resume", folder=str(tmp_path / "b"), resume=checkpoint, model_seed=3, **values
    )
    assert [result["step"] for result in resumed] == [4, 4]
    assert len(resumed[0]["loss"]) == 4  # two of the checkpoint's history
    assert resumed[0]["loss"][:2] == whole[0]["loss"][:2]
    # Two steps away from the checkpoint, and not from another initial model.
    saved = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    for name, value in resumed[0]["full"].items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=3e-3)


def test_the_best_model_is_loaded_and_few_are_kept(ranks4, tmp_path):
    for losses, at_end, left, best in ranks4.run(f"{CASES}:best_model", timeout=120, folder=str(tmp_path), sdp=HALF):
        assert len(losses) < 12  # stopped early
        assert at_end == pytest.approx(min(losses), rel=1e-6) != losses[-1]
        assert best.endswith(f"checkpoint-{losses.index(min(losses)) + 1}")
        assert left == sorted([Path(best).name, f"checkpoint-{len(losses)}"])
    model = AutoModelForCausalLM.from_pretrained(best)
    assert sum(p.isnan().sum() for p in model.parameters()) == 0


HABITS = {
    "bf16": {"bf16": True},
    "group_by_length": {"lengths": [4, 12, 9, 7], "train_sampling_strategy": "group_by_length"},
    "stream": {"stream": True},
    "tokens": {"include_num_input_tokens_seen": "non_padding", "lengths": [4, 12]},
    "scheduler": {
        "warmup_steps": 2,
        "ds": {
            "optimizer": {
                "type": "AdamW",
                "params": {**dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"), "torch_adam": True},
            },
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": dict.fromkeys(
                    ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"
                ),
            },
        },
    },
    "ds_optimizer": {
        "ds": {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}}
    },
}


@pytest.mark.parametrize(
    "habit", [habit if habit in ("scheduler", "group_by_length", "stream") else slow(habit) for habit in HABITS]
)
def test_habits(ranks4, tmp_path, habit):
    one, two = (
        ranks4.run(f"{CASES}:habits", timeout=90, folder=str(tmp_path / which), sdp=sdp, which=which, **HABITS[habit])
        for which, sdp in (("sdp", FULL), ("plain", None))
    )
    for sdp, plain in zip(one, two, strict=True):
        # In bf16 the reductions differ in dtype.
        assert sdp["loss"] == pytest.approx(plain["loss"], rel=1e-2 if habit == "bf16" else 1e-5)
        assert len(sdp["loss"]) == 3
        for key in ("lr", "tokens", "flos", "dtypes"):
            assert sdp[key] == plain[key], key


@pytest.mark.parametrize("masking", [slow("forward"), "backward"])
def test_flops_are_those_of_the_subnetwork(ranks4, tmp_path, masking):
    results = ranks4.run(f"{CASES}:habits", timeout=90, folder=str(tmp_path), sdp={**HALF, "masking": masking})
    full = tiny_model()
    dense = sum(p.numel() for p in full.parameters()) - full.model.embed_tokens.weight.numel()
    assert all(
        computed == (dense if masking == "backward" else trained)
        for computed, trained in (r["worked"] for r in results)
    )
    assert all(trained < 0.8 * dense for _, trained in (r["worked"] for r in results))
    tokens = 3 * 2 * 12
    expected = sum(tokens * (4 * computed + 2 * trained) for computed, trained in (r["worked"] for r in results))
    assert results[0]["flos"] == pytest.approx(expected)


@pytest.mark.parametrize(("meta", "masking"), [slow(False, "forward"), (True, "forward"), slow(False, "backward")])
def test_it_trains_like_the_script(ranks4, tmp_path, meta, masking):
    results = ranks4.run(
        f"{CASES}:like_the_script", timeout=90, folder=str(tmp_path), sdp=HALF, meta=meta, masking=masking
    )
    for trainer, script, _, _ in results:
        assert trainer == pytest.approx(script, rel=1e-5)
    for name, value in results[0][2].items():
        torch.testing.assert_close(value, results[0][3][name], rtol=1e-5, atol=1e-6)


REFUSALS = {
    "no deepspeed": "SDPTrainer: got no DeepSpeed config; takes TrainingArguments(deepspeed=",
    "unsupported": "model: no adapter knows T5ForConditionalGeneration",
    "peft": "merge them first (merge_and_unload)",
    "no block": "takes TrainingArguments(deepspeed=<file or dict>) with a block",
    "auto_find_batch_size": "TrainingArguments.auto_find_batch_size: got True; takes False with SDP",
    "cut already": "and not one that is a subnetwork already",
    "meta evaluation": "evaluate: got a model on the meta device before training",
    "coverage": "coverage: got 0.3 with 4 subnetworks",
    "auto": "subnetwork_data_parallel.coverag: unknown key",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_mistakes_say_what_to_do(ranks4, tmp_path, what):
    for kind, message, is_ours in ranks4.run(f"{CASES}:refusal", timeout=60, folder=str(tmp_path), what=what):
        assert REFUSALS[what] in message
        assert is_ours, kind


def test_no_complete_checkpoint_is_removed_for_one_that_is_not(ranks4, tmp_path):
    sdp = {**HALF, "checkpoint": {"on_error": "continue"}}
    results = ranks4.run(f"{CASES}:failing_saves", timeout=90, folder=str(tmp_path / "a"), sdp=sdp, fails_at=(2, 4))
    seen, left = results[0]
    assert [of_step[0][1] for of_step in seen[1:]] == [True] * 3
    assert max(map(len, seen)) == 1
    assert left == [("checkpoint-3", True)]
    sdp = {**HALF, "checkpoint": {"async": True}}
    results = ranks4.run(f"{CASES}:failing_saves", timeout=90, folder=str(tmp_path / "b"), sdp=sdp, slow_finish=True)
    seen, left = results[0]
    assert all(any(complete for _, complete in of_step) for of_step in seen[2:])
    assert left == [("checkpoint-4", True)]


def test_another_jobs_output_folder_is_refused_on_all_ranks_and_the_last_step_is_saved(ranks4, tmp_path):
    locks = FolderLocks()
    locks.take(tmp_path)
    for message, steps, names in ranks4.run(f"{CASES}:save_beside_another_job", timeout=90, folder=str(tmp_path)):
        assert message.startswith(f"OutputError: checkpoint: {tmp_path} is written by process {os.getpid()} on ")
        assert (steps, names) == (2, [LOCK])
    locks.release()
    for message, steps, names in ranks4.run(f"{CASES}:save_beside_another_job", timeout=90, folder=str(tmp_path)):
        assert (message, steps, names) == (None, 3, ["checkpoint-2", "checkpoint-3"])
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {mode}
    assert not list(tmp_path.rglob(".*"))


def test_stage_3_builds_models_whole(ranks4, tmp_path):
    one, three = (
        ranks4.run(f"{CASES}:built_afterwards", timeout=90, folder=str(tmp_path), sdp=HALF, stage=stage)
        for stage in (1, 3)
    )
    for losses, expected in zip(three, one, strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_smoothed_labels_are_shifted_however_it_is_evaluated(ranks4, tmp_path):
    one, two = (
        ranks4.run(f"{CASES}:smoothed", timeout=90, folder=str(tmp_path), sdp=HALF, evaluation=evaluation)[0]
        for evaluation in ("gathered", "streamed")
    )
    assert one == pytest.approx(two, rel=1e-5)


def test_the_full_model_is_gathered_once(ranks4, tmp_path):
    assert ranks4.run(f"{CASES}:gathers", timeout=90, folder=str(tmp_path), sdp=HALF) == [[1, 1]] * 4


def test_pushing_fails_as_it_does_without(ranks4, tmp_path):
    one, two = (
        ranks4.run(f"{CASES}:refusal", timeout=60, folder=str(tmp_path), what=what)[0]
        for what in ("push", "push-plain")
    )
    assert one == two
    assert not one[2]


def test_enable_brings_it_to_trainer_itself(ranks4, tmp_path):
    for own, plain in ranks4.run(f"{CASES}:enabled", timeout=90, folder=str(tmp_path), sdp=HALF):
        assert own == plain
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("SDPTrainer", "Trainer/checkpoint-3")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_loop_with_accelerate(ranks4, tmp_path):
    results = ranks4.run(f"{CASES}:accelerate_loop", timeout=90, folder=str(tmp_path), sdp=HALF)
    for losses, expected, *_ in results:
        assert losses == pytest.approx(expected, rel=1e-6)
        assert len(losses) == 3
    _, _, weights, full, again = results[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, value in full.items():
        assert torch.equal(value, weights[name])
        assert torch.equal(value, again[name])
        assert torch.equal(value, loaded[name])
