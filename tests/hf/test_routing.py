"""What stands between accelerate and DeepSpeed, without any rank."""

import deepspeed
import pytest
from accelerate.state import PartialState

from deepspeed_sdp.config import BLOCK
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.hf.routing import routed


def test_processes_that_accelerate_does_not_see(monkeypatch):
    PartialState._reset_state()
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with routed(), pytest.raises(ConfigError, match=r"sees 1 of 2 processes; on CPUs takes .*--use_cpu"):
        deepspeed.initialize(config={BLOCK: {}})
    PartialState._reset_state()
