"""The default process group is the user's, and a destroyed engine leaves nothing behind and takes no calls."""

import pytest
import torch

STAGES = [
    pytest.param(0, {"coverage": 0.5}, id="0"),
    pytest.param(2, {"coverage": 0.5, "comm": {"transport": "owner_sets"}}, id="2-owner_sets"),
    pytest.param(3, {"coverage": 0.5}, id="3"),
    pytest.param(
        1,
        {
            "coverage": 0.5,
            "masking": "backward",
            "backward": {"overlap_refresh": True},
        },
        id="1-backward",
    ),
]


@pytest.mark.parametrize(("stage", "sdp"), STAGES[:2])
def test_a_users_collective_in_the_backward_pass_is_its_own(ranks4, stage, sdp):
    case = "tests.engine.lifetime_cases:user_collectives_in_backward"
    alone, beside = (ranks4.run(case, stage=stage, sdp=sdp, with_user=flag, timeout=60) for flag in (False, True))
    for without, with_user in zip(alone, beside, strict=True):
        assert with_user["sums"]
        assert set(with_user["sums"]) == {0.0 + 1 + 2 + 3}
        assert with_user["losses"] == without["losses"]
        for name, value in without["weights"].items():
            assert torch.equal(value, with_user["weights"][name]), name


@pytest.mark.parametrize(("stage", "sdp"), STAGES)
def test_a_destroyed_engine_refuses_and_leaves_a_plain_module(ranks4, stage, sdp):
    results = ranks4.run("tests.engine.lifetime_cases:destroyed", stage=stage, sdp=sdp, timeout=90)
    for result in results:
        for call, answer in result["answers"].items():
            assert "destroyed" in answer, (call, answer)
        assert not result["hooks"]
        assert result["groups"][1] == result["groups"][2], "process groups are left"
        assert len(result["losses"]) == 2
    alone = results[0]["alone"]
    assert alone == "done" if stage < 3 else "gathered_weights" in alone


@pytest.mark.parametrize("name", ["failing_callable", "scheduler_callable", "deepspeed's own config"])
def test_a_refused_job_leaves_no_process_groups(ranks4, name):
    for first, second in ranks4.run("tests.engine.lifetime_cases:refused", timeout=60, name=name):
        assert first == second
