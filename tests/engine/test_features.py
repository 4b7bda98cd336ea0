"""DeepSpeed's and torch's features keep their meaning, against the reference simulator."""

import csv
import itertools
from pathlib import Path

import pytest
import torch

from deepspeed_sdp.plan import SubnetworkPlan
from tests.engine.cases import build_model
from tests.support.compare import assert_like, assert_owners_equal, assert_same_weights, simulate
from tests.support.models import token_batches

CASES = "tests.engine.feature_cases"
HALF = {"coverage": 0.5}


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        ("no_sync", 0),
        ("no_sync", 1),
        ("plain", 0),
        ("plain", 1),
        ("plain", 2),
        ("plain", 3),
        ("torch", 1),
        ("torch", 3),
    ],
)
def test_own_accumulation(ranks4, how, stage):
    results = ranks4.run(f"{CASES}:own_accumulation", timeout=60, how=how, stage=stage)
    assert_owners_equal(results)
    module, _, norms = simulate(results[0], steps=4, ds={"clip": 1.0, "accumulation": 3})
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same_weights(results[0]["full"], module.state_dict(), 1e-5)


def test_no_sync_is_refused_where_gradients_are_sharded(ranks4):
    with pytest.raises(AssertionError, match="no_sync context manager is incompatible"):
        ranks4.run(f"{CASES}:own_accumulation", timeout=60, how="no_sync", stage=2)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("how", [pytest.param("engine", marks=pytest.mark.slow), "layers"])
def test_compiled_blocks(ranks4, how, stage):
    results = ranks4.run(f"{CASES}:compiled", timeout=180, how=how, stage=stage, backend="aot_eager")
    assert_owners_equal(results)
    assert_like(results, simulate(results[0], steps=3))


@pytest.mark.slow
def test_compiled_by_inductor(ranks4):
    results = ranks4.run(f"{CASES}:compiled", timeout=500, how="layers", stage=1, backend="inductor")
    assert_like(results, simulate(results[0], steps=3))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(ranks4, reentrant, stage):
    results = ranks4.run(f"{CASES}:checkpointed", timeout=60, reentrant=reentrant, stage=stage)
    assert_like(results, simulate(results[0], steps=3))


def test_activation_checkpointing_of_blocks_at_stage_3(ranks4):
    values = {"sdp": {"granularity": "layer"}, "model": {"num_hidden_layers": 5}}
    results = ranks4.run(f"{CASES}:checkpointed", timeout=60, reentrant=False, stage=3, **values)
    assert_like(results, simulate(results[0], steps=3, **values))


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"stage": 1, **OFFLOAD}, id="stage1"),
        pytest.param({"stage": 2, **OFFLOAD}, id="stage2"),
        pytest.param({"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}}, id="stage3"),
        pytest.param({"stage": 3, "stage3_prefetch_bucket_size": 0}, id="stage3-no_prefetch"),
    ],
)
def test_offload_and_prefetch(ranks4, zero):
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    results = ranks4.run("tests.engine.cases:train", timeout=60, sdp=HALF, ds={**config, "clip": 1.0})
    assert_owners_equal(results)
    assert_like(results, simulate(results[0], ds={"clip": 1.0}))


def test_monitor_and_wall_clock(ranks4, tmp_path):
    results = ranks4.run(f"{CASES}:monitored", timeout=60, folder=str(tmp_path))
    rows = {file.stem: list(csv.reader(file.open()))[1:] for file in Path(tmp_path).rglob("*.csv")}
    phases = {"forward", "backward", "backward_inner", "backward_allreduce", "step"}
    assert {f"Train_Samples_elapsed_time_ms_{phase}" for phase in phases} <= set(rows)
    assert [float(value) for _, value in rows["Train_Samples_lr"]] == [1e-3] * 3
    assert [float(value) for _, value in rows["Train_SDP_grad_norm"]] == pytest.approx(results[0]["norms"])
    assert float(rows["Train_SDP_bytes_sent"][-1][1]) == results[0]["stats"]["bytes_sent"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_bad_gradient_is_named(ranks4, action, stage):
    results = ranks4.run(f"{CASES}:not_finite", timeout=60, action=action, stage=stage)
    report = "step 2: gradients are not finite (rank 2: nan in model.layers.1.mlp.up_proj.weight"
    for result in results:
        before, after = result["snapshots"][1], result["snapshots"][2]
        assert all(torch.equal(before[name], after[name]) for name in before), "the bad step must change nothing"
        if action == "stop":
            kind, message = result["error"]
            assert kind == "NonFiniteError"
            assert report in message
        else:
            assert result["error"] is None
            assert result["skipped"] == 1
            last = result["snapshots"][3]
            assert any(not torch.equal(after[name], last[name]) for name in after), "training goes on"
    if action == "skip":
        assert report in results[0]["log"]
        assert "not finite" not in results[1]["log"], "one report"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_owners_that_differ_are_named(ranks4, stage):
    healthy = ranks4.run(f"{CASES}:inconsistent", stage=stage, bad_rank=-1, name="", unit=0)
    assert [(result["error"], result["steps"]) for result in healthy] == [(None, 6)] * 4
    plan = SubnetworkPlan.from_json(healthy[0]["plan"])
    unit = 40
    bad, other = plan.owners("model.layers.1.mlp", unit)
    name = "model.layers.1.mlp.up_proj.weight"
    results = ranks4.run(f"{CASES}:inconsistent", stage=stage, bad_rank=bad, name=name, unit=unit)
    for result in results:
        kind, message = result["error"]
        assert kind == "ConsistencyError"
        assert result["steps"] == 3, "found before the next update"
        assert "step 4: ranks hold different weights" in message
        assert "model.layers." in message
        assert f"rank(s) {bad}" in message
        assert str(other) in message
    assert len({result["error"][1] for result in results}) == 1


def test_a_difference_before_any_step_is_named_by_unit(ranks4):
    results = ranks4.run(
        f"{CASES}:inconsistent", stage=0, bad_rank=1, name="model.norm.weight", unit=3, interval=1, bad_step=1
    )
    kind, message = results[0]["error"]
    assert kind == "ConsistencyError"
    assert "step 1" in message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_scales_the_loss_on_all_ranks_alike(ranks4, stage):
    results = ranks4.run(f"{CASES}:fp16", timeout=60, stage=stage, power=20, steps=16, clip=1.0)
    assert_owners_equal(results)
    for result in results:
        assert result["scales"] == results[0]["scales"]
        assert result["skipped"] == results[0]["skipped"]
    scales = results[0]["scales"]
    skips = [after - before for before, after in itertools.pairwise([0, *results[0]["skipped"]])]
    assert skips[0] == 1, "a scale of 2**20 overflows"
    first = skips.index(0)
    assert scales[:first] == [2.0 ** (20 - i) for i in range(1, first + 1)], "halved until it fits"
    # The first step that counts is the simulator's first on those batches; what was skipped left no trace.
    module, losses, norms = simulate_fp16(results, skips)
    applied = [i for i, skip in enumerate(skips) if not skip]
    assert [results[1]["losses"][i] for i in applied] == pytest.approx([step[1] for step in losses], abs=0.01)
    assert [results[0]["norms"][i] for i in applied] == pytest.approx(norms, rel=0.01)
    assert_same_weights(results[0]["full"], module.state_dict(), 2e-3)


def simulate_fp16(results, skips):
    """The simulator in fp32 from the weights that fp16 leaves, on the batches of the steps that were not skipped."""
    module = build_model()
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    steps = token_batches(len(skips), 4)
    batches = [step for step, skip in zip(steps, skips, strict=True) if not skip]
    return simulate(results[0], module=module, ds={"clip": 1.0}, batches=batches)


@pytest.mark.parametrize("stage", [1, 2])
def test_fp16_at_full_coverage_is_deepspeeds(ranks4, stage):
    ours = ranks4.run(f"{CASES}:fp16", timeout=60, stage=stage, power=18, steps=10, sdp={"coverage": 1.0})
    theirs = ranks4.run(f"{CASES}:fp16", timeout=60, stage=stage, power=18, steps=10, plain=True)
    assert ours[0]["scales"] == theirs[0]["scales"]
    assert ours[0]["skipped"] == theirs[0]["skipped"]
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], abs=0.01)


@pytest.mark.parametrize("transport", ["owner_sets", "all_to_all"])
def test_bf16_gradients_are_reduced_in_fp32_unless_the_job_says_otherwise(ranks4, transport):
    norms, sent = {}, {}
    # Averages are kept as they come.
    kept = {"bf16": True, "data_types": {"grad_accum_dtype": "fp32"}}
    for dtype, asked in (("bf16", {"communication_data_type": "bf16"}), ("fp32", {})):
        sdp, ds = (
            {"coverage": 1.0, "comm": {"transport": transport}},
            {"stage": 2, **kept, **asked},
        )
        results = ranks4.run("tests.engine.cases:train", timeout=60, sdp=sdp, steps=1, ds=ds)
        assert_owners_equal(results)
        norms[dtype] = results[0]["norms"][0]
        sent[dtype] = sum(
            n for kind, n in results[0]["stats"]["bytes_sent_by_kind"].items() if kind.startswith("gradient")
        )
    exact = ranks4.run(
        "tests.engine.cases:train",
        timeout=60,
        sdp={"coverage": 1.0},
        steps=1,
        ds={"stage": 0, **kept, "communication_data_type": "fp32"},
    )[0]["norms"][0]
    assert norms["fp32"] == pytest.approx(exact, rel=1e-6)
    if transport == "owner_sets":  # the other one sums what came in fp32
        assert norms["bf16"] != pytest.approx(exact, rel=1e-6)
    assert sent["fp32"] == 2 * sent["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"stage": 0}, {"stage": 1}, {"stage": 2, "bf16": True}], ids=str)
def test_owners_stay_equal_for_thousands_of_steps(ranks4, values):
    assert_owners_equal(ranks4.run(f"{CASES}:long_run", timeout=500, steps=2000, lr=3e-4, **values))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_forward_pass_around_the_engine(ranks4, stage):
    results = ranks4.run(f"{CASES}:around_the_engine", timeout=60, stage=stage)
    module, _, norms = simulate(results[0], steps=3, ds={"accumulation": 2})
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same_weights(results[0]["full"], module.state_dict(), 1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["retain", "no_grad", "gathered", "evaluate", "weights"])
def test_unusual_passes_at_stage_3_are_those_of_stage_1(ranks4, how, tied):
    norms = {
        stage: ranks4.run(f"{CASES}:unusual_passes", timeout=60, how=how, stage=stage, tied=tied) for stage in (1, 3)
    }
    assert norms[3] == pytest.approx(norms[1], rel=1e-6)


def test_two_forward_passes_before_a_backward_pass_are_refused_at_stage_3(ranks4):
    assert isinstance(ranks4.run(f"{CASES}:unusual_passes", how="two_forwards", stage=1, tied=False)[0], float)
    errors = ranks4.run(f"{CASES}:unusual_passes", timeout=60, how="two_forwards", stage=3, tied=False)
    assert all("takes one forward call of the whole model before each backward pass" in error for error in errors)


def test_after_a_failed_backward_pass_the_reason_is_said(ranks4):
    for first, second in ranks4.run(f"{CASES}:failed_backward", timeout=60):
        assert "out of luck" in first
        assert "an earlier backward pass failed (ValueError: out of luck)" in second


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_that_nobody_asked_for_are_dropped(ranks4, stage):
    assert ranks4.run(f"{CASES}:left_out", timeout=60, stage=stage) == [True] * 4
