"""Subnetworks of another plan, in the middle of a training."""

import pytest
import torch

from tests.engine.cases import build_model
from tests.support.compare import adamw, assert_owners_equal, assert_same_weights, simulate
from tests.support.models import token_batches

CASES = "tests.engine.repartition_cases"


def check(results, ds, world=4, family="llama", model=None, steps=2):
    """Each stretch of steps is the simulation's under the plan of that time, with one optimizer for all."""
    module = build_model(family, model).double()
    optimizer = adamw(module)
    for number in range(len(results[0])):
        stretch = [of_rank[number] for of_rank in results]
        assert all(result["same"] for result in stretch), "the full model does not change"
        assert_owners_equal(stretch)
        batches = token_batches(steps, world, ds.get("accumulation", 1), seed=number + 1)
        said = stretch[0]["sdp"]
        if said["masking"] == "backward":
            said["output_scaling"] = "none"
        _, losses, norms = simulate(
            stretch[0], sdp=said, ds=ds, world=world, module=module, optimizer=optimizer, batches=batches
        )
        for rank, result in enumerate(stretch):
            assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=1e-5)
            assert result["norms"] == pytest.approx(norms, rel=1e-5)
        assert_same_weights(stretch[0]["full"], module.state_dict(), 1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resampled_plans(ranks4, stage):
    sdp, ds = {"coverage": 0.5}, {"stage": stage, "bucket": 4000}
    stages = [{"round": (1, "rotate")}, {"round": (3, "random")}]
    check(ranks4.run(f"{CASES}:train", stages=stages, ds=ds, sdp=sdp), ds)


CHANGES = {
    "other coverage": ({"coverage": 0.5}, [{"coverage": 0.75}, {"coverage": 0.25}, {"coverage": 1.0}]),
    "other granularity": (
        {"coverage": 0.5},
        [{"granularity": "layer"}, {"granularity": "branch"}, {"granularity": "neuron"}],
    ),
    "other number": ({"coverage": 0.5}, [{"num_subnetworks": 2}, {"num_subnetworks": 4, "coverage": 0.75}]),
    "other masking": ({"coverage": 0.5}, [{"masking": "backward"}, {"round": (1, "rotate")}, {"masking": "forward"}]),
    "blocks, backward": (
        {"coverage": 0.5, "masking": "backward", "granularity": "layer"},
        [{"round": (1, "random")}, {"granularity": "neuron"}],
    ),
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CHANGES)
def test_other_plans(ranks4, case, stage):
    sdp, stages = CHANGES[case]
    if stage == 3 and "backward" in str((sdp, stages)):
        pytest.skip("refused")
    ds = {"stage": stage, "bucket": 4000, "accumulation": 2, "clip": 1.0}
    model = {"num_hidden_layers": 4}
    check(ranks4.run(f"{CASES}:train", stages=stages, ds=ds, sdp=sdp, model=model), ds, model=model)


@pytest.mark.parametrize("change", [{"round": (1, "random")}, {"coverage": 0.25}, {"masking": "backward"}], ids=str)
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, True), (2, False), (3, True)])
def test_there_and_back_changes_nothing(ranks4, change, stage, bf16):
    if stage == 3 and "masking" in change:
        pytest.skip("refused")
    ds = {"stage": stage, "bf16": bf16, "bucket": 4000}
    results = ranks4.run(f"{CASES}:round_trip", ds=ds, sdp={"coverage": 0.5}, change=change)
    for gone, stayed in results:
        assert (gone["losses"], gone["norms"]) == (stayed["losses"], stayed["norms"])
    gone, stayed = results[0]
    assert all(torch.equal(gone["full"][name], stayed["full"][name]) for name in stayed["full"])


MANY = [
    {"round": (1, "rotate")},
    {"coverage": 0.25},
    {"coverage": 0.75},
    {"num_subnetworks": 2, "coverage": 0.5},
    {"num_subnetworks": 4, "granularity": "layer"},
    {"granularity": "neuron"},
]


@pytest.mark.parametrize(("stage", "times"), [(1, 42), pytest.param(3, 1002, marks=pytest.mark.slow)])
def test_many_leave_nothing(ranks4, stage, times):
    values = {"times": times, "stage": stage, "sdp": {"coverage": 0.5}, "changes": MANY}
    for few, many in ranks4.run(f"{CASES}:many", timeout=550, **values):
        assert few == many


def test_a_client_finds_what_it_had_and_bytes_are_few(ranks4):
    ds = {"stage": 1, "bucket": 4000}
    results = ranks4.run(f"{CASES}:one_of_many_things", sdp={"coverage": 0.5}, ds=ds, change={"round": (1, "rotate")})
    numel = sum(parameter.numel() for parameter in build_model().parameters())
    assert all(0 < sent <= 12 * numel / 4 for sent in results)


def test_what_does_not_fit_is_refused_and_training_goes_on(ranks4):
    changes = [{"coverage": 0.4}, {"colour": 1}, {"num_subnetworks": 3}, {"masking": "sideways"}]
    for said in ranks4.run(f"{CASES}:refused", sdp={"coverage": 0.5}, ds={"stage": 1}, changes=changes):
        assert len(said) == 5
        assert "subnetwork_data_parallel.coverage: got 0.4" in said[0]
        assert "colour" in said[1]
        assert "num_subnetworks: got 3 with a world size of 4" in said[2]
        assert said[4].startswith("StateError: engine.repartition: got a call in the middle of a step")


SCHEDULES = {
    "rotate": {"resample_interval": 1},
    "random": {"resample_interval": 2, "resample": "random"},
    "growing": {"coverage_schedule": [[0.0, 0.25], [0.5, 0.5], [0.75, 1.0]], "total_steps": 8},
    "both": {"coverage_schedule": [[0.0, 0.5], [0.5, 0.75]], "total_steps": 8, "resample_interval": 3},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_the_simulation_of_it(ranks4, schedule):
    sdp, ds = {"schedule": SCHEDULES[schedule]}, {"stage": 1, "bucket": 4000}
    results = ranks4.run(f"{CASES}:by_schedule", ds=ds, sdp=sdp, steps=8)
    module = build_model().double()
    optimizer = adamw(module)
    for step, result in enumerate(results[0]):
        batches = token_batches(1, 4, seed=step + 1)
        _, losses, norms = simulate(
            result, sdp=result["sdp"], ds=ds, module=module, optimizer=optimizer, batches=batches
        )
        for rank in range(4):
            assert results[rank][step]["losses"] == pytest.approx([losses[0][rank]], abs=1e-5)
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same_weights(results[0][-1]["full"], module.state_dict(), 1e-5)
    assert len({result["plan"] for result in results[0]}) > 1


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("schedule", ["random", "both"])
def test_a_job_goes_on_across_a_change_to_the_bit(ranks4, tmp_path, schedule, stage):
    sdp, ds = {"schedule": SCHEDULES[schedule]}, {"stage": stage, "bucket": 4000}
    values = {"folder": str(tmp_path), "save_at": 3, "steps": 7}
    for result in ranks4.run(f"{CASES}:scheduled", ds=ds, sdp=sdp, **values):
        assert result["again"]["first"] == result["plans"][0]
        assert result["again"]["went_on"] == result["whole"]
        if result["full"] is not None:
            assert all(torch.equal(result["full"][name], value) for name, value in result["again"]["full"].items())
