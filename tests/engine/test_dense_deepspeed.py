"""To and from jobs of plain, dense DeepSpeed: by its universal format, with weights, moments and schedule."""

import subprocess
import sys

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from deepspeed_sdp.checkpoint.summary import locate
from deepspeed_sdp.cli import main
from deepspeed_sdp.engine.state.universal import _load
from deepspeed_sdp.errors import CheckpointError
from tests.engine.test_checkpoints import BACKWARD, CASES, HALF, tensors_of

DENSE_CASES = "tests.engine.dense_cases"
DENSE = {"coverage": 1.0}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def to_universal(folder):
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    places = ["--input_folder", folder / "global_step3", "--output_folder", folder / "global_step3_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*command, *places, *workers], check=True, capture_output=True, timeout=120)


def flat(tensors):
    return {name: value.reshape(-1) for name, value in tensors.items()}


def assert_same(one, two):
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    ("stage", "sdp", "target"),
    [
        slow(1, HALF, {"stage": 2}),
        (3, HALF, {"stage": 1}),
        slow(2, BACKWARD, {"stage": 0}),
        (1, DENSE, {"stage": 1}),
    ],
    ids=["half", "from-3", "backward", "dense"],
)
def test_from_dense_deepspeed(ranks4, tmp_path, stage, sdp, target):
    dense = tmp_path / "dense"
    precision = {"bf16": sdp != DENSE}
    saved = ranks4.run(f"{DENSE_CASES}:train_dense", timeout=90, folder=str(dense), ds={"stage": stage, **precision})
    to_universal(dense)
    values = {"folder": str(dense), "sdp": sdp, "ds": {**target, **precision}, "out": str(tmp_path / "out")}
    taken = ranks4.run(f"{DENSE_CASES}:take_up", timeout=90, **values)
    assert_same(saved[0][0], flat(tensors_of(locate(tmp_path / "out"))))
    for result, (_, losses) in zip(taken, saved, strict=True):
        assert (result["client_state"], result["steps"]) == ({"consumed": 17}, 3)
        assert result["lr"] == taken[0]["lr"] != [0.0]
        if sdp == DENSE:
            assert result["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("sdp", "ds", "stage"),
    [
        slow(HALF, {"stage": 1}, 1),
        (HALF, {"stage": 3}, 3),
        slow(BACKWARD, {"stage": 2}, 2),
        slow(DENSE, {"stage": 1}, 1),
    ],
    ids=["half", "to-3", "backward", "dense"],
)
def test_to_dense_deepspeed(ranks4, tmp_path, capsys, sdp, ds, stage):
    precision = {"bf16": sdp != DENSE}
    values = {"folder": str(tmp_path / "sdp"), "sdp": sdp, "ds": {**ds, **precision}}
    saved = ranks4.run(f"{CASES}:save_and_go_on", timeout=90, **values)
    assert main(["export", str(tmp_path / "sdp"), str(tmp_path / "universal"), "--universal"]) == 0
    target = {"stage": stage, **precision}
    taken = ranks4.run(f"{DENSE_CASES}:take_up_dense", timeout=90, folder=str(tmp_path / "universal"), ds=target)
    state, client_state, steps, _, losses = taken[0]
    assert_same(flat(tensors_of(locate(tmp_path / "sdp"))), state)
    assert (client_state["consumed"], steps) == (17, 3)
    if sdp == DENSE:
        assert losses == pytest.approx(saved[0]["losses"], rel=1e-5)


def test_deepspeeds_own_format_is_refused_with_the_command_that_converts_it(ranks4, tmp_path):
    ranks4.run(f"{DENSE_CASES}:train_dense", timeout=90, folder=str(tmp_path), ds={"stage": 1}, steps=1)
    messages = ranks4.run(f"{CASES}:load_error", timeout=60, folder=str(tmp_path), sdp=HALF, ds={"stage": 1})
    assert len(set(messages)) == 1
    assert "is one of DeepSpeed's own; takes its universal format: python -m deepspeed.checkpoint" in messages[0]


def test_a_hostile_universal_checkpoint_is_refused(ranks4, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    values = {"sdp": HALF, "ds": {"stage": 1}}
    ranks4.run(f"{CASES}:save_and_go_on", timeout=60, folder=str(tmp_path / "c"), steps=1, more=0, **values)
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "u"), "--universal"]) == 0
    file = next(tmp_path.glob("u/*/zero/model.norm.weight/exp_avg.pt"))
    torch.save({"param": Hostile()}, file)
    for message in ranks4.run(f"{CASES}:load_error", timeout=60, folder=str(tmp_path / "u"), **values):
        assert f"{file} is refused" in message
    assert not (tmp_path / "owned").exists()


class ByName:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return (getattr, (self.owner, self.name))


def test_members_by_name_are_read_and_nothing_else_is(tmp_path):
    """As some versions of Python pickle DeepSpeed's stage."""
    file = tmp_path / "optimizer_state.pt"
    torch.save({"zero_stage": ByName(ZeroStageEnum, "weights")}, file)
    assert _load(file) == {"zero_stage": ZeroStageEnum.weights}
    torch.save({"zero_stage": ByName(ZeroStageEnum, "mro")}, file)
    with pytest.raises(CheckpointError, match="is refused"):
        _load(file)
    torch.save({"zero_stage": ByName(LossScaler, "__init__")}, file)
    with pytest.raises(CheckpointError, match="is refused"):
        _load(file)
