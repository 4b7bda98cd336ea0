"""The plan is made once, on rank 0."""


def test_rank_0_plans_for_all(ranks4):
    reports = ranks4.run("tests.engine.planning_cases:planned", timeout=60)
    assert [calls for calls, _ in reports] == [1, 0, 0, 0]
    assert len({plan_hash for _, plan_hash in reports}) == 1
