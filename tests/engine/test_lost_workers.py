"""Files of workers are gone: what other owners wrote is taken instead."""

import json

import pytest
import torch

from deepspeed_sdp.checkpoint.export import export
from deepspeed_sdp.checkpoint.summary import locate
from deepspeed_sdp.cli import main
from tests.engine.test_checkpoints import BACKWARD, CASES, HALF, LAYERS, assert_same_tensors
from tests.support.compare import assert_owners_equal

TINY = {"bucket": 4000}
LAYOUTS = {
    "half-0": (HALF, {"stage": 0}, 2),
    "half-1": (HALF, {"stage": 1, **TINY}, 2),
    "half-1-bf16": (HALF, {"stage": 1, "bf16": True}, 2),
    "half-2-owner_sets": (
        {**HALF, "comm": {"transport": "owner_sets"}},
        {"stage": 2, **TINY},
        2,
    ),
    "half-3": (HALF, {"stage": 3, **TINY}, 2),
    "three_quarters-1": ({"coverage": 0.75}, {"stage": 1}, 3),
    "layers-0": (LAYERS, {"stage": 0}, 2),
    "backward-1": (BACKWARD, {"stage": 1, **TINY}, 2),
    "dense-2": ({"coverage": 1.0}, {"stage": 2, **TINY}, 4),
}


def lose(folder, workers):
    """Remove what the ranks of ``workers`` wrote; the names."""
    gone = [path for w in workers for path in locate(folder).glob(f"*-{w:05d}*")]
    assert len(gone) >= 3 * len(workers)
    for path in gone:
        path.unlink()
    return [path.name for path in gone]


QUICK = (("half-0", False), ("half-1", True), ("three_quarters-1", False), ("backward-1", False), ("half-3", False))


@pytest.mark.parametrize(
    ("layout", "is_async"),
    [
        pytest.param(layout, mode, marks=[] if (layout, mode) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for mode in (False, True)
    ],
)
def test_k_minus_1_workers_may_be_lost_and_the_run_goes_on_to_the_bit(ranks4, tmp_path, layout, is_async):
    sdp, ds, owners = LAYOUTS[layout]
    sdp = {**sdp, "checkpoint": {"copies": owners, "async": is_async}}
    values = {"folder": str(tmp_path), "sdp": sdp, "ds": ds, "frozen": ["model.layers.1.mlp.up_proj.weight"]}
    expected = ranks4.run(f"{CASES}:save_and_go_on", timeout=90, **values)
    lose(tmp_path, range(4 - owners + 1, 4))
    resumed = ranks4.run(f"{CASES}:load_and_go_on", timeout=90, **values)
    assert_owners_equal(resumed)
    for before, after in zip(expected, resumed, strict=True):
        assert (after["losses"], after["norms"]) == (before["losses"], before["norms"])
    assert_same_tensors(expected[0]["full"], resumed[0]["full"])


@pytest.mark.parametrize("stage", [0, 1])
def test_with_replicas_the_copy_is_another_workers(ranks4, tmp_path, stage):
    sdp = {"num_subnetworks": 2, "coverage": 1.0, "checkpoint": {"copies": 2}}
    values = {"folder": str(tmp_path), "sdp": sdp, "ds": {"stage": stage, **TINY}}
    expected = ranks4.run(f"{CASES}:save_and_go_on", timeout=90, **values)
    # Both ranks of worker 0; the layout of worker 1 is another rank's.
    kept = [(path, path.read_bytes()) for path in locate(tmp_path).glob("layout-00001*")]
    lose(tmp_path, (0, 1))
    for path, content in kept:
        path.write_bytes(content)
    resumed = ranks4.run(f"{CASES}:load_and_go_on", timeout=90, **values)
    assert [r["losses"] for r in resumed] == [r["losses"] for r in expected]


def test_without_copies_the_loss_is_said_and_an_older_one_offered(ranks4, tmp_path):
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1}}
    for tag in ("old", "new"):
        ranks4.run(f"{CASES}:save_and_go_on", timeout=60, tag=tag, steps=1, more=0, **values)
    lose(tmp_path, [2])
    messages = ranks4.run(f"{CASES}:load_error", timeout=60, **values)
    assert len(set(messages)) == 1
    assert "layout-00002.json is missing" in messages[0]
    assert "no other file holds all that was in it" in messages[0]
    assert messages[0].endswith("complete ones there: old")


def test_more_losses_than_copies_are_refused(ranks4, tmp_path):
    values = {"folder": str(tmp_path), "sdp": {**HALF, "checkpoint": {"copies": 2}}, "ds": {"stage": 1}}
    ranks4.run(f"{CASES}:save_and_go_on", timeout=60, steps=1, more=0, **values)
    lose(tmp_path, [0, 1, 2])
    assert "no other file holds" in ranks4.run(f"{CASES}:load_error", timeout=60, **values)[0]


def test_a_damaged_file_is_replaced_by_copies_too(ranks4, tmp_path, capsys):
    values = {"folder": str(tmp_path), "sdp": {**HALF, "checkpoint": {"copies": 2}}, "ds": {"stage": 1}}
    saved = ranks4.run(f"{CASES}:save_and_go_on", timeout=60, more=0, **values)
    file = locate(tmp_path) / "tensors-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    loaded = ranks4.run(f"{CASES}:load_and_go_on", timeout=60, more=0, **values)
    assert_same_tensors(saved[0]["full"], loaded[0]["full"])
    assert main(["inspect", str(tmp_path), "--verify", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["written_by"]["copies"] == 2
    assert len(summary["damage"]) == 1
    assert str(file) in summary["damage"][0]
    from transformers import AutoModelForCausalLM

    export(locate(tmp_path), tmp_path / "hf", torch.float32)
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict(), saved[0]["full"])


def test_more_copies_than_owners_are_refused_at_the_start(ranks4, tmp_path):
    messages = ranks4.run(
        f"{CASES}:start_error", timeout=60, sdp={**HALF, "checkpoint": {"copies": 3}}, ds={"stage": 1}
    )
    assert messages == ["subnetwork_data_parallel.checkpoint.copies: got 3 with 2 owners per unit; takes 1 to 2"] * 4
