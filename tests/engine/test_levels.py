"""Replicas that are cut into rings of rings train, exchange and save what one ring does."""

import pytest

from tests.engine.test_against_oracle import SHARING
from tests.engine.test_checkpoints import assert_same_tensors, tensors_of
from tests.support.compare import assert_like, assert_owners_equal, simulate

TWO = {"num_subnetworks": 2, "coverage": 0.5}
# Two workers, four replicas of each, in pairs of pairs; on two nodes, in pairs too.
pytestmark = pytest.mark.slow


def run(pool, case, levels, **values):
    names = {"ranks_per_node": levels, "has_short_rings": True} if levels else {"ranks_per_node": 8}
    return pool.run("tests.engine.cases:on_nodes", timeout=120, on_rank=case, **names, **values)


@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize(("stage", "transport", "masking"), SHARING)
def test_they_train_like_the_simulation(pools, stage, transport, masking, ranks_per_node):
    sdp = {**TWO, "comm": {"transport": transport}, "masking": masking}
    values = {"sdp": sdp, "ds": {"stage": stage, "bucket": 4000, "clip": 1.0}}
    results = run(pools(8), "tests.engine.cases:train", ranks_per_node, **values)
    assert_owners_equal(results)
    assert_like(results, simulate(results[0], world=8, **values))


@pytest.mark.parametrize(("stage", "masking"), [(0, "forward"), (2, "backward"), (3, "forward")])
def test_checkpoints_go_between_levels_and_one_ring(pools, tmp_path, stage, masking):
    values = {"sdp": {**TWO, "masking": masking}, "ds": {"stage": stage, "bf16": True}}
    first, second = tmp_path / "first", tmp_path / "second"
    run(pools(8), "tests.engine.checkpoint_cases:save_and_go_on", 1, folder=str(first), more=0, **values)
    loaded = run(
        pools(8), "tests.engine.checkpoint_cases:load_and_save", 0, folder=str(first), out=str(second), **values
    )
    assert_owners_equal(loaded)
    assert_same_tensors(*(tensors_of(folder / "global_step3") for folder in (first, second)))
