"""bf16 with fp32 master weights, accumulation dtypes, and gradients that are not finite."""

import pytest
import torch

from tests.engine.cases import build_model
from tests.support.compare import assert_owners_equal, simulate

HALF = {"coverage": 0.5}
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}


def bf16_simulation(results, ds, **options):
    """The simulator in fp32, from the weights that bf16 leaves: start, trained model, losses, norms."""
    module = build_model()
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    return start, *simulate(results[0], module=module, ds=ds, **options)


ROWS = [
    pytest.param({"stage": 0}, id="stage0"),
    pytest.param({"stage": 1, "clip": 1.0}, id="stage1-clip"),
    pytest.param({"stage": 2, "bucket": 4000}, id="stage2-tiny_buckets"),
    pytest.param({"stage": 0, "accumulation": 2, **FP32}, id="stage0-accumulate-fp32"),
    pytest.param({"stage": 1, "accumulation": 2, **FP32}, id="stage1-accumulate-fp32"),
    pytest.param({"stage": 2, "accumulation": 2, "bucket": 4000, **FP32}, id="stage2-accumulate-fp32"),
    pytest.param({"stage": 2, "accumulation": 2, "clip": 1.0}, id="stage2-accumulate-bf16"),
    pytest.param({"stage": 3, "clip": 1.0}, id="stage3-clip"),
    pytest.param({"stage": 3, "accumulation": 2, **FP32}, id="stage3-accumulate-fp32"),
]


@pytest.mark.parametrize("ds", ROWS)
def test_bf16_is_close_to_the_fp32_simulation(ranks4, ds):
    results = ranks4.run("tests.engine.cases:train", timeout=60, sdp=HALF, ds={**ds, "bf16": True})
    assert_owners_equal(results)
    start, module, losses, norms = bf16_simulation(results, ds)
    # bf16 rounds to 2**-9: logits of about 1 are off by some 2**-8 after three layers, a mean of 44 losses by less; a
    # norm, of which each gradient is off by a few 2**-9, likewise.
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=0.02)
        assert result["norms"] == pytest.approx(norms, rel=0.02)
        assert result["norms"] == results[0]["norms"]
    # What training changed points the same way. A wrong average turns it by far more: see the next test.
    assert update_similarity(results[0]["full"], module.state_dict(), start) > 0.99


def test_the_tolerance_tells_subnetworks_apart_from_the_dense_model(ranks4):
    ds = {"stage": 2}
    results = ranks4.run("tests.engine.cases:train", timeout=60, sdp={"coverage": 1.0}, ds={**ds, "bf16": True})
    halves = ranks4.run("tests.engine.cases:train", timeout=60, sdp=HALF, ds={**ds, "bf16": True})
    start, module, _, norms = bf16_simulation(halves, ds)
    assert update_similarity(results[0]["full"], module.state_dict(), start) < 0.97
    assert results[0]["norms"] != pytest.approx(norms, rel=0.02)


def update_similarity(weights, expected, start):
    ours = torch.cat([(weights[name] - start[name]).flatten() for name in start])
    theirs = torch.cat([(expected[name] - start[name]).flatten() for name in start])
    return float(torch.cosine_similarity(ours, theirs, dim=0))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_loss_goes_down(ranks4, stage):
    results = ranks4.run(
        "tests.engine.cases:train",
        timeout=60,
        sdp=HALF,
        steps=25,
        repeat=True,
        ds={"stage": stage, "bf16": True, "lr": 5e-3, "clip": 1.0},
    )
    assert_owners_equal(results)
    for result in results:
        assert result["losses"][-1] < result["losses"][0] - 1.0


def test_fp32_accumulation_is_exact_at_every_stage(ranks4):
    norms = {}
    for stage, dtype in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]:
        extra = {"data_types": {"grad_accum_dtype": dtype}, "communication_data_type": dtype}
        ds = {"stage": stage, "bf16": True, "accumulation": 8, **extra}
        results = ranks4.run("tests.engine.cases:train", timeout=60, sdp=HALF, steps=1, ds=ds)
        norms[stage, dtype] = results[0]["norms"][0]
    # The gradients of the micro-batches are the same bf16 numbers everywhere; only sums of them could round.
    assert norms[1, "fp32"] == pytest.approx(norms[0, "fp32"], rel=1e-6)
    assert norms[3, "fp32"] == pytest.approx(norms[0, "fp32"], rel=1e-6)
    assert norms[2, "fp32"] == pytest.approx(norms[0, "fp32"], rel=1e-6)
    for stage in (1, 2):
        assert norms[stage, "bf16"] != pytest.approx(norms[0, "fp32"], rel=1e-6)
        assert norms[stage, "bf16"] == pytest.approx(norms[0, "fp32"], rel=1e-2)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_infinite_gradient_on_one_rank_skips_the_step_everywhere(ranks4, stage, bf16):
    results = ranks4.run(
        "tests.engine.cases:one_rank_overflows", timeout=60, stage=stage, bf16=bf16, bad_step=1, bad_rank=2
    )
    assert_owners_equal(results)
    for result in results:
        first, skipped, last = result["snapshots"]
        assert result["skipped"] == 1
        for name in first:
            assert torch.equal(first[name], skipped[name]), f"{name} changed in a step that was to be skipped"
            assert torch.isfinite(last[name]).all()
        assert any(not torch.equal(skipped[name], last[name]) for name in first), "training must go on"
