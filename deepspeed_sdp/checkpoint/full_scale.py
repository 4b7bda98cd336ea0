"""The full model's scale on what its writes add, in a checkpoint: see :mod:`deepspeed_sdp.engine.full.calibration`.

Weights in a checkpoint are those of the training. Who takes them for the full model multiplies writes by the scale, and
divides their moments, which belong to gradients of the weights.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepspeed_sdp.checkpoint.meta import META, read_plan
from deepspeed_sdp.subnetwork import cut_model, meta_model

FULL_SCALE = "full_scale"

# From a logical tensor's name and value to the full model's value.
Scaling = Callable[[str, torch.Tensor], torch.Tensor]

# Powers of the gradient in what optimizers keep; what is not listed does not scale.
_POWERS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}


def factor_on(logical: str, scale: float) -> float:
    """What a logical tensor of a write (``master[.<name>]``, ``optimizer.<state>[.<name>]``) is multiplied by."""
    kind, _, rest = logical.partition(".")
    if kind != "optimizer":
        return scale
    return float(scale ** -_POWERS.get(rest.partition(".")[0], 0))


def parameter_of(logical: str) -> str:
    """Name of the parameter that a logical tensor belongs to."""
    kind, _, rest = logical.partition(".")
    return rest.partition(".")[2] if kind == "optimizer" else rest


def writes_of(checkpoint: Path, meta: Mapping[str, Any], config: Any) -> frozenset[str]:
    """Names of the parameters of the full model that a checkpoint's scale is for.

    Args:
        config: of the full model.
    """
    block = meta["subnetwork_data_parallel"]
    unit = None if block["granularity"] == "neuron" else block["granularity"]
    return cut_model(meta_model(config, META), read_plan(checkpoint), 0, block_unit=unit).writes


def scaling_of(checkpoint: Path, meta: Mapping[str, Any], config: Any) -> Scaling:
    """What turns logical tensors of ``checkpoint`` into those of the full model."""
    scale = float(meta.get(FULL_SCALE, 1.0))
    if scale == 1.0:
        return lambda _, value: value
    writes = writes_of(checkpoint, meta, config)

    def scaled(logical: str, value: torch.Tensor) -> torch.Tensor:
        return value * factor_on(logical, scale) if parameter_of(logical) in writes else value

    return scaled
