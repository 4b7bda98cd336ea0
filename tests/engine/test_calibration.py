"""The full model's scale: found, applied wherever the full model is seen, kept by checkpoints."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from deepspeed_sdp.checkpoint.export import export
from deepspeed_sdp.checkpoint.summary import locate
from deepspeed_sdp.checkpoint.universal_export import export_universal
from deepspeed_sdp.engine.calibration import best_scale
from tests.engine.cases import build_model

CASES = "tests.engine.calibration_cases"
HALF = {"coverage": 0.5}


@given(best=st.floats(0.05, 8.0), start=st.floats(0.2, 2.0), bend=st.floats(0.01, 10.0))
def test_the_least_of_a_parabola_is_found(best, start, bend):
    calls = []

    def loss(scale):
        calls.append(scale)
        return 3.0 + bend * math.log2(scale / best) ** 2

    assert best_scale(loss, start) == pytest.approx(best, rel=1e-3)
    assert len(calls) == len(set(calls)) <= 4 + 4 * abs(math.log2(best / start))


@given(start=st.floats(0.1, 4.0), bad=st.sampled_from([math.nan, math.inf]))
def test_a_loss_that_is_no_number_changes_nothing(start, bad):
    assert best_scale(lambda _: bad, start) == start


@given(best=st.floats(0.2, 2.0))
def test_one_side_that_overflows_is_kept_away_from(best):
    found = best_scale(lambda scale: math.nan if scale > 1.1 * best else (scale - best) ** 2, best)
    assert 0.5 * best < found <= 1.1 * best


ROWS = [
    pytest.param({"sdp": HALF, "ds": {"stage": 1}}, id="neurons"),
    pytest.param({"sdp": {"coverage": 0.25, "output_scaling": "none"}, "ds": {"stage": 3}}, id="unscaled-stage3"),
    pytest.param({"sdp": {**HALF, "granularity": "block"}, "ds": {"stage": 2, "bf16": True}}, id="layers-bf16"),
    pytest.param(
        {"sdp": {**HALF, "granularity": "block", "block_unit": "branch"}, "ds": {"stage": 0}, "family": "gpt2"},
        id="gpt2-branches",
    ),
    pytest.param({"sdp": {**HALF, "partition": ["mlp"]}, "ds": {"stage": 1}, "family": "gpt2"}, id="gpt2-mlp"),
]
WRITES = ("o_proj.weight", "down_proj.weight", "c_proj.weight")


def is_write(name, values):
    if values["sdp"].get("partition") == ["mlp"] and ".attn." in name:
        return False
    return name.endswith((*WRITES, "c_proj.bias") if "block_unit" in values["sdp"] else WRITES)


@pytest.mark.parametrize("values", ROWS)
def test_the_full_model_is_scaled_and_training_is_not(ranks4, values):
    results = ranks4.run(f"{CASES}:calibrate", timeout=90, **values)
    first = results[0]
    scale = first["scale"]
    assert {result["scale"] for result in results} == {scale}
    assert scale != 1.0
    tolerance = 2e-2 if values["ds"].get("bf16") else 1e-6
    for name, value in first["after"].items():
        expected = first["before"][name] * (scale if is_write(name, values) else 1.0)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=1e-7, msg=name)
    # At its best, no worse than as it was, and what is exported.
    assert first["loss_after"] <= first["loss_before"] + 1e-6
    assert first["loss_after"] <= first["loss_beside"] + 1e-3
    exported = build_model(values.get("family", "llama"), values.get("model"))
    exported.load_state_dict(first["after"])
    exported.eval()
    with torch.no_grad():
        losses = [exported(**batch).loss for result in results for batch in result["batches"]]
    loose = 1e-2 if values["ds"].get("bf16") else 1e-5
    assert first["loss_after"] == pytest.approx(float(torch.stack(losses).mean()), abs=loose)
    for result in results:
        assert all(torch.equal(one, two) for one, two in zip(result["owned"], result["owned_after"], strict=True))


def test_under_backward_masking_there_is_nothing_to_find(ranks4):
    values = {"sdp": {**HALF, "masking": "backward"}, "ds": {"stage": 1}}
    first = ranks4.run(f"{CASES}:calibrate", timeout=90, **values)[0]
    assert first["scale"] == 1.0
    assert all(torch.equal(value, first["before"][name]) for name, value in first["after"].items())


TARGETS = [
    pytest.param(HALF, {"stage": 1}, id="the_same"),
    pytest.param({"coverage": 0.75}, {"stage": 2}, id="other_coverage"),
    pytest.param({"coverage": 1.0}, {"stage": 1}, id="dense"),
    pytest.param({**HALF, "masking": "backward"}, {"stage": 2}, id="backward"),
    pytest.param({**HALF, "partition": ["mlp"]}, {"stage": 3}, id="mlp_alone"),
]


@pytest.mark.parametrize(("sdp", "ds"), TARGETS)
def test_a_checkpoint_keeps_the_full_model(ranks4, tmp_path, sdp, ds):
    """Whatever layout takes it up: its weights, and the moments that belong to them."""
    folder, other = tmp_path / "one", tmp_path / "two"
    saved = ranks4.run(
        f"{CASES}:save_calibrated", timeout=90, folder=str(folder), hf=str(tmp_path / "hf"), sdp=HALF, ds={"stage": 1}
    )
    loaded = ranks4.run(f"{CASES}:load_and_save", timeout=90, folder=str(folder), out=str(other), sdp=sdp, ds=ds)
    assert_close(loaded[0], saved[0])
    export(locate(folder), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert_close(exported, AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict())
    assert_close(exported, saved[0])
    # What a dense job is given is the same, by either way.
    one, two = (export_universal(locate(place), tmp_path / f"universal-{place.name}") for place in (folder, other))
    files = sorted(path.relative_to(one) for path in (one / "zero").glob("*/*.pt"))
    assert any("exp_avg_sq" in str(file) for file in files)
    for file in files:
        values = [torch.load(path / file, weights_only=False) for path in (one, two)]
        if isinstance(values[0], dict):
            torch.testing.assert_close(values[1]["param"], values[0]["param"], rtol=1e-5, atol=0, msg=str(file))


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-5, atol=1e-9, msg=name)
