"""With K = N a subnetwork is the model, and SDP is DeepSpeed's data parallelism."""

import pytest

from tests.support.compare import assert_owners_equal, assert_same_weights

DENSE = [{"coverage": 1.0}, {"num_subnetworks": 2, "coverage": 1.0}, {"num_subnetworks": 1}]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_full_coverage_is_deepspeed(ranks4, stage, bf16, accumulation):
    ds = {"stage": stage, "bf16": bf16, "clip": 1.0, "accumulation": accumulation}
    sdp = DENSE[stage] if stage < 2 else {"coverage": 1}
    ours = ranks4.run("tests.engine.cases:train", timeout=60, sdp={**sdp, "output_scaling": "inverse_coverage"}, ds=ds)
    theirs = ranks4.run("tests.engine.cases:train_deepspeed", timeout=60, ds=ds)
    assert_owners_equal(ours)
    # Both add the same numbers in different orders. In bf16 that is one rounding of a weight (2**-8 of it; norms are up
    # to 1.3) and, through the logits, some thousandths of the loss.
    loss, weight, norm = (0.02, 2**-7, 0.05) if bf16 else (2e-6, 1e-6, 1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], abs=loss)
        assert mine["losses"][0] == other["losses"][0], "before the first update both are the same model"
        if None not in other["norms"]:  # plain DeepSpeed has no norm in fp32 at stage 0
            assert mine["norms"] == pytest.approx(other["norms"], rel=norm)
    assert_same_weights(ours[0]["full"], {**ours[0]["full"], **theirs[0]["weights"]}, weight)
    assert set(ours[0]["full"]) == set(theirs[0]["weights"])


def test_disabled_is_deepspeed_itself(ranks4):
    ds = {"stage": 1}
    ours = ranks4.run("tests.engine.cases:train_disabled", timeout=60, ds=ds)
    theirs = ranks4.run("tests.engine.cases:train_deepspeed", timeout=60, ds=ds)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["engine"] == "DeepSpeedEngine"
        assert mine["losses"] == other["losses"]
