"""What stands between accelerate and DeepSpeed, without any rank."""

import deepspeed
import pytest
from accelerate import Accelerator
from accelerate.state import PartialState
from transformers import Trainer

from deepspeed_sdp.config import BLOCK
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.hf.routing import disable, enable, routed
from deepspeed_sdp.hf.trainer import METHODS


def test_processes_that_accelerate_does_not_see(monkeypatch):
    PartialState._reset_state()
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with routed(), pytest.raises(ConfigError, match=r"sees 1 of 2 processes; on CPUs takes .*--use_cpu"):
        deepspeed.initialize(config={BLOCK: {}})
    PartialState._reset_state()


def test_what_is_enabled_can_be_taken_back():
    def patched():
        return [deepspeed.initialize, Accelerator.prepare, Accelerator.get_state_dict, *map(vars(Trainer).get, METHODS)]

    before = patched()
    enable()
    enable()
    assert not set(map(id, before)) & set(map(id, patched()))
    disable()
    assert patched() == before
