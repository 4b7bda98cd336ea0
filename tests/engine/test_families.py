"""Every family: carved, trained against the reference simulator, evaluated, saved and loaded again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspeed_sdp.checkpoint.summary import locate
from deepspeed_sdp.cli import main
from tests.engine.test_checkpoints import CASES as CHECKPOINT_CASES
from tests.engine.test_checkpoints import assert_same_tensors, check_pair, tensors_of
from tests.support.compare import assert_like, assert_owners_equal, simulate

CASES = "tests.engine.cases"
HALF = {"coverage": 0.5}
BLOCKS = {**HALF, "granularity": "layer"}
BACKWARD = {**HALF, "masking": "backward"}
NEW = ("gemma", "gpt2", "gpt_neox")
TIED = {"gemma": True, "gpt2": True, "gpt_neox": False}
PLANS = {
    "half-1": (HALF, {"stage": 1, "bucket": 4000, "clip": 1.0}),
    "half-3": (HALF, {"stage": 3, "bucket": 4000}),
    "three_quarters-2": (
        {"coverage": 0.75, "plan": {"chunk_multiple": 1}},
        {"stage": 2, "accumulation": 2},
    ),
    "layers-1": (BLOCKS, {"stage": 1}),
    "branches-0": ({**BLOCKS, "granularity": "branch"}, {"stage": 0}),
    "backward-1": (BACKWARD, {"stage": 1, "bucket": 4000}),
    "backward-0": (
        {**BACKWARD, "coverage": 0.75, "plan": {"chunk_multiple": 1}},
        {"stage": 0},
    ),
    "backward-layers-2": ({**BLOCKS, "masking": "backward"}, {"stage": 2}),
}
QUICK = ("half-1", "backward-1")


@pytest.mark.parametrize(
    ("family", "plan"),
    [pytest.param(family, plan, marks=[] if plan in QUICK else pytest.mark.slow) for family in NEW for plan in PLANS],
)
def test_like_the_simulation(ranks4, family, plan):
    sdp, ds = PLANS[plan]
    values = {"family": family, "model": {"tie_word_embeddings": TIED[family]}, "sdp": sdp, "ds": ds}
    results = ranks4.run(f"{CASES}:train", timeout=90, **values)
    assert_owners_equal(results)
    assert_like(results, simulate(results[0], **values))


ONE_QUICK = [family if family == "gpt2" else pytest.param(family, marks=pytest.mark.slow) for family in NEW]


@pytest.mark.parametrize("family", ONE_QUICK)
def test_any_layout_goes_to_any_other(pools, tmp_path, family):
    values = {"family": family, "model": {"tie_word_embeddings": TIED[family]}}
    check_pair(pools, tmp_path / "a", "half-1", "backward-1", **values)
    check_pair(pools, tmp_path / "b", "layers-3", "half-3", **values)


@pytest.mark.parametrize("family", NEW)
def test_evaluated_saved_and_loaded_again(ranks4, tmp_path, family):
    values = {"family": family, "model": {"tie_word_embeddings": TIED[family]}}
    results = ranks4.run(f"{CASES}:evaluate_and_save", timeout=90, folder=str(tmp_path / "hf"), sdp=HALF, **values)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    for streamed, gathered in results:
        assert streamed == pytest.approx(expected, rel=1e-5)
        assert gathered == pytest.approx(expected, rel=1e-5)
    before, after, _ = ranks4.run(
        f"{CHECKPOINT_CASES}:from_hf_folder",
        timeout=60,
        folder=str(tmp_path / "b"),
        sdp={"coverage": 0.75, "plan": {"chunk_multiple": 1}},
        ds={"stage": 2},
        **values,
    )[0]
    assert_same_tensors(before, after)


@pytest.mark.parametrize("family", ONE_QUICK)
def test_built_on_the_meta_device(ranks4, family):
    values = {"family": family, "model": {"tie_word_embeddings": TIED[family]}, "meta": True, "steps": 1}
    one = ranks4.run(f"{CASES}:train", timeout=90, sdp=HALF, **values)
    two = ranks4.run(f"{CASES}:train", timeout=90, sdp={"coverage": 0.25}, ds={"stage": 3}, **values)
    assert_owners_equal(one)
    three = ranks4.run(f"{CASES}:train", timeout=90, sdp={"coverage": 1.0}, ds={"lr": 0.0}, **values)[0]["full"]
    for name, value in one[0]["full"].items():
        # One small step away from the same start.
        torch.testing.assert_close(value, three[name], rtol=0, atol=3e-3)
        torch.testing.assert_close(two[0]["full"][name], three[name], rtol=0, atol=3e-3)
    if family == "gpt2":
        spread = {part: float(three[f"transformer.h.1.mlp.{part}.weight"].std()) for part in ("c_fc", "c_proj")}
        assert spread["c_proj"] == pytest.approx(spread["c_fc"] / 6**0.5, rel=0.15)


@pytest.mark.parametrize("family", ONE_QUICK)
def test_exported(ranks4, tmp_path, capsys, family):
    values = {"family": family, "model": {"tie_word_embeddings": TIED[family], "intermediate_size": 64}}
    saved = ranks4.run(
        f"{CHECKPOINT_CASES}:save_and_go_on",
        timeout=60,
        folder=str(tmp_path),
        sdp=HALF,
        ds={"stage": 1},
        more=0,
        **values,
    )
    assert main(["export", str(tmp_path), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    assert_same_tensors(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()), saved[0]["full"])
    shapes = {name.partition(".")[2]: value.shape for name, value in tensors_of(locate(tmp_path)).items()}
    assert all(value.shape == shapes[name] for name, value in saved[0]["full"].items() if name in shapes)
    code = main(["export", str(tmp_path), str(tmp_path / "small"), "--subnetwork", "1"])
    if family == "gemma":
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert small.config.intermediate_size == 32
    else:
        assert code == 1
        assert "a config of this family has no words for" in capsys.readouterr().err
