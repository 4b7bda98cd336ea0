"""Subnetworks of another plan, in the middle of a training."""

import pytest

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


LAYERS = {"granularity": "layer"}
CHANGES = {
    "other coverage": ({"coverage": 0.5}, [{"coverage": 0.75}, {"coverage": 0.25}, {"coverage": 1.0}]),
    "other granularity": (
        {"coverage": 0.5},
        [{"granularity": "layer"}, {"granularity": "branch"}, {"granularity": "neuron"}],
    ),
    "other number": ({"coverage": 0.5}, [{"num_subnetworks": 2}, {"num_subnetworks": 4, "coverage": 0.75}]),
    "other masking": ({"coverage": 0.5}, [{"masking": "backward"}, {"round": (1, "rotate")}, {"masking": "forward"}]),
    "blocks, backward": (
        {"coverage": 0.5, "masking": "backward", **LAYERS},
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
