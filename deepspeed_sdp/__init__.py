"""Subnetwork Data Parallelism for DeepSpeed (arXiv 2507.09029).

``deepspeed_sdp.initialize`` mirrors ``deepspeed.initialize``; see the README for the block that configures it.
"""

from typing import TYPE_CHECKING, Any

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.errors import (
    CheckpointError,
    ConfigError,
    ConsistencyError,
    DataError,
    ModelError,
    NonFiniteError,
    OutputError,
    PlanError,
    SDPError,
    StateError,
    WaitError,
)

if TYPE_CHECKING:
    from deepspeed_sdp.engine import SDPEngine, initialize
    from deepspeed_sdp.plan import SubnetworkPlan

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConsistencyError",
    "DataError",
    "ModelError",
    "NonFiniteError",
    "OutputError",
    "PlanError",
    "SDPConfig",
    "SDPEngine",
    "SDPError",
    "StateError",
    "SubnetworkPlan",
    "WaitError",
    "initialize",
]

_LAZY = {
    "SDPEngine": "deepspeed_sdp.engine",
    "initialize": "deepspeed_sdp.engine",
    "SubnetworkPlan": "deepspeed_sdp.plan",
}


def __getattr__(name: str) -> Any:
    # DeepSpeed and transformers take seconds to import; --help and the pure parts do not need them.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
