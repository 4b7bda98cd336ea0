"""What DeepSpeed's engine says of a job, read once: no other file asks its configuration."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScalerBase

from deepspeed_sdp.config import SDPConfig, default_bucket_numel

# The dtype in which gradients travel unless the job says: sums of many ranks lose the small ones in 16 bits, which
# DeepSpeed would take by default.
REDUCE = torch.float32


def parts_ahead(prefetch_bucket_size: int) -> int:
    """Parts that are gathered ahead at stage 3."""
    return 1 if prefetch_bucket_size else 0


@dataclass(frozen=True)
class Place:
    """Where something rests between its uses.

    Attributes:
        device: the engine's, or the CPU.
        is_offloaded: whether the job asks for the CPU.
        is_pinned: whether that memory is to be page-locked.
    """

    device: torch.device
    is_offloaded: bool = False
    is_pinned: bool = False


@dataclass(frozen=True)
class Settings:
    """Of one engine.

    Attributes:
        sdp: the SDP block.
        stage: of ZeRO.
        device: of weights and gradients.
        dtype: of weights.
        accumulate: dtype in which the micro-batches of a step are summed.
        reduce: dtype in which gradients travel.
        round_numel, portion_numel: elements of the full model in a round of gradients, and in a portion of weights.
        prefetch: parts that are gathered ahead at stage 3.
        state: where master weights and the optimizer's state rest.
        weights: where shards rest at stage 3.
        clip_grad: largest norm of the gradient, 0 for none.
        loss_scaler: DeepSpeed's.
    """

    sdp: SDPConfig
    stage: int
    device: torch.device
    dtype: torch.dtype
    accumulate: torch.dtype
    reduce: torch.dtype
    round_numel: int
    portion_numel: int
    prefetch: int
    state: Place
    weights: Place
    clip_grad: float
    loss_scaler: LossScalerBase

    @classmethod
    def of(cls, engine: DeepSpeedEngine, sdp: SDPConfig) -> "Settings":
        """Of an engine in the middle of its construction: its configuration and device are there."""
        zero = engine._config.zero_config
        dtype, accumulate = engine.get_data_types()
        round_numel = reduce_bucket_numel(engine)
        return cls(
            sdp=sdp,
            stage=engine.zero_optimization_stage(),
            device=engine.device,
            dtype=dtype,
            accumulate=accumulate,
            reduce=engine._config.communication_data_type or REDUCE,
            round_numel=round_numel,
            # Gradients are needed in fp32 a portion at a time: whoever asks for small rounds has little memory.
            portion_numel=_asked_numel(engine, "allgather_bucket_size", round_numel),
            prefetch=parts_ahead(zero.prefetch_bucket_size),
            state=_place(zero.offload_optimizer, engine.device),
            weights=_place(zero.offload_param, engine.device),
            clip_grad=engine.gradient_clipping(),
            loss_scaler=CreateLossScaler(
                dtype=dtype,
                static_loss_scale=engine.loss_scale(),
                dynamic_scaling=engine.dynamic_loss_scale(),
                dynamic_loss_args=engine.dynamic_loss_scale_args(),
            ),
        )


def reduce_bucket_numel(engine: DeepSpeedEngine) -> int:
    """Elements of the full model in a bucket of gradients, of an engine of this package."""
    return _asked_numel(engine, "reduce_bucket_size", default_bucket_numel(dist.get_backend(), dist.get_world_size()))


def _asked_numel(engine: DeepSpeedEngine, key: str, default: int) -> int:
    """What the job itself says of ``zero_optimization.<key>``, else ``default``."""
    zero = engine._config._param_dict.get("zero_optimization", {})
    asked = zero.get(key, "auto") if isinstance(zero, dict) else "auto"
    return default if asked == "auto" else int(asked)


def _place(offload: Any, device: torch.device) -> Place:
    is_offloaded = offload is not None and offload.device == "cpu"
    return Place(torch.device("cpu"), True, offload.pin_memory) if is_offloaded else Place(device)
