"""The plan is made once, on rank 0; what ranks agree on is compared by digest."""

import pytest


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_rank_0_plans_for_all_and_ranks_that_agree_gather_nothing(ranks4, masking):
    reports = ranks4.run("tests.engine.planning_cases:planned", timeout=60, masking=masking)
    assert [calls for calls, *_ in reports] == [1, 0, 0, 0]
    assert [gathers for _, gathers, _ in reports] == [0] * 4
    assert len({plan_hash for *_, plan_hash in reports}) == 1
