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
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.full.calibration import best_scale, scales_to_try
from deepspeed_sdp.plan import UnitSpace, make_plan
from tests.engine.cases import build_model

CASES = "tests.engine.calibration_cases"
HALF = {"coverage": 0.5}


def scales(coverage, output_scaling):
    sdp = SDPConfig.parse({"coverage": coverage, "output_scaling": output_scaling})
    plan = make_plan([UnitSpace("layers.0.mlp", "mlp", 0, 64, 32)], 4, owners_per_unit=round(4 * coverage))
    return scales_to_try(plan, sdp)


SCALINGS = st.sampled_from(["none", "inverse_sqrt_coverage", "inverse_coverage"])


@given(
    best=st.floats(0.05, 8.0), coverage=st.sampled_from([0.25, 0.5, 0.75]), scaling=SCALINGS, bend=st.floats(0.01, 9)
)
def test_the_least_of_a_parabola_is_found_and_nothing_beyond_what_theory_knows(best, coverage, scaling, bend):
    tried = scales(coverage, scaling)
    found = best_scale(lambda scale: 3.0 + bend * math.log2(scale / best) ** 2, tried)
    assert found == pytest.approx(min(max(best, tried[0]), tried[-1]), rel=1e-3 if tried[1] < best < tried[-2] else 0.1)
    assert tried[0] <= found <= tried[-1]


def test_what_is_tried_reaches_from_the_mean_of_the_subnetworks_to_the_sum_of_strangers():
    for scaling, power in (("none", 0.0), ("inverse_sqrt_coverage", 0.5), ("inverse_coverage", 1.0)):
        for coverage in (0.25, 0.5):
            tried = scales(coverage, scaling)
            assert tried[1] == pytest.approx(coverage ** (1 - power))
            assert tried[-2] == pytest.approx(coverage ** (0.5 - power))
            assert len(tried) == 3 - 2 * math.log2(coverage)


@given(bad=st.sampled_from([math.nan, math.inf]), scaling=SCALINGS)
def test_a_loss_that_is_no_number_gives_a_scale_that_is_tried(bad, scaling):
    tried = scales(0.5, scaling)
    assert best_scale(lambda _: bad, tried) in tried


@given(best=st.floats(0.6, 1.1))
def test_one_side_that_overflows_is_kept_away_from(best):
    tried = scales(0.5, "inverse_sqrt_coverage")
    assert best_scale(lambda scale: math.nan if scale > 1.1 * best else (scale - best) ** 2, tried) <= 1.1 * best


def test_a_valley_behind_a_hill_is_seen():
    """As early in a training, where a walk from one end stops at the first rise."""
    tried = scales(0.25, "inverse_sqrt_coverage")
    losses = dict(zip(tried, [4.0, 3.9, 4.1, 3.8, 3.5, 3.0, 3.2], strict=True))
    assert tried[4] < best_scale(losses.__getitem__, tried) < tried[6]


ROWS = [
    pytest.param({"sdp": HALF, "ds": {"stage": 1}}, id="neurons"),
    pytest.param({"sdp": {"coverage": 0.25, "output_scaling": "none"}, "ds": {"stage": 3}}, id="unscaled-stage3"),
    pytest.param({"sdp": {**HALF, "granularity": "layer"}, "ds": {"stage": 2, "bf16": True}}, id="layers-bf16"),
    pytest.param(
        {"sdp": {**HALF, "granularity": "branch"}, "ds": {"stage": 0}, "family": "gpt2"},
        id="gpt2-branches",
    ),
    pytest.param({"sdp": {**HALF, "partition": ["mlp"]}, "ds": {"stage": 1}, "family": "gpt2"}, id="gpt2-mlp"),
]
WRITES = ("o_proj.weight", "down_proj.weight", "c_proj.weight")


def is_write(name, values):
    if values["sdp"].get("partition") == ["mlp"] and ".attn." in name:
        return False
    return name.endswith((*WRITES, "c_proj.bias") if values["sdp"].get("granularity") == "branch" else WRITES)


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
    # At its best on the half it was sought on, better than none on the other, and what is exported.
    assert first["fitted"][1] <= min(first["fitted"]) + 1e-3 or scale in (first["tried"][0], first["tried"][-1])
    assert first["held_back"][1] < first["held_back"][0]
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


# Of large and random initial values: what the full model's units add is noise, and the less of it the better.
NOISE = {"initializer_range": 0.5}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sdp": HALF}, "is the least that is tried"),
        ({"sdp": {"coverage": 0.25, "output_scaling": "none"}}, "is no better on samples held back for it"),
        ({"sdp": HALF, "few": True}, "got 1 samples over all ranks, takes 2 or more"),
    ],
    ids=["at_the_bound", "no_better", "too_little_text"],
)
def test_early_in_a_training_the_model_is_not_silenced_and_it_says_so(ranks4, values, said):
    results = ranks4.run(
        f"{CASES}:calibrate_untrained",
        timeout=90,
        **{"ds": {"stage": 1, "lr": 1e-3}, "model": NOISE, "steps": 1, **values},
    )
    scale, losses = results[0]["scale"], results[0]["losses"]
    assert {result["scale"] for result in results} == {scale}
    assert scale in (1.0, results[0]["tried"][0])
    assert losses[scale] <= losses[1.0]
    assert values.get("few") or losses[0.3] < losses[scale], (
        "silence has a lower loss: a search without bounds goes there"
    )
    assert [said in message for message in results[0]["said"]] == [True]
    assert all(result["said"] == [] for result in results[1:])


def test_text_is_halved_alike_however_it_is_dealt(ranks4):
    for without in ([], [3, 4, 5, 9]):
        kept = [number for number in range(24) if number not in without]
        for rows in (1, 2, 3, 6):
            results = ranks4.run(f"{CASES}:split", timeout=60, rows=rows, without=without)
            assert {result[2] for result in results} == {len(kept)}
            for half in (0, 1):
                assert sorted(row for result in results for row in result[half]) == kept[half::2]


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
