"""``optimizer.state_dict()``: what one rank holds of the training state, for this rank and this layout again.

A checkpoint (:mod:`deepspeed_sdp.engine.state.checkpointing`) knows no layout; this is DeepSpeed's call, for whoever
keeps a rank's state himself.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.engine.comm.description import digest
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY
from deepspeed_sdp.errors import CheckpointError

if TYPE_CHECKING:
    from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer

_KEYS = {"sdp_layout", "param_groups", "loss_scaler", "state"}


def own_state(optimizer: "SDPOptimizer") -> dict[str, Any]:
    """As of torch's optimizers, its tensors are those that training changes."""
    optimizer.refresh.settle()
    return {
        "sdp_layout": _layout(optimizer),
        "param_groups": [
            {key: value for key, value in group.items() if key not in ("params", GROUP_KEY)}
            for group in optimizer.param_groups
        ],
        "loss_scaler": dict(vars(optimizer.loss_scaler)),
        "state": [{"master": master.data, **optimizer.state.get(master, {})} for master in optimizer.masters.values()],
    }


def take_own_state(optimizer: "SDPOptimizer", saved: Any) -> None:
    """Collective. Go on from what :func:`own_state` gave; the weights are those of its master weights.

    Raises:
        CheckpointError: it is of another rank or layout, or no such state; on every rank.
    """
    agreed(lambda: _check(saved, _layout(optimizer)))
    optimizer.refresh.settle()
    optimizer.zero_grad()
    with torch.no_grad():
        for master, values in zip(optimizer.masters.values(), saved["state"], strict=True):
            master.copy_(values["master"])
            state = {key: _like(value, master) for key, value in values.items() if key != "master"}
            optimizer.optimizer.state[master] = state
            if not state:
                del optimizer.optimizer.state[master]
    for group, options in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update(copy.deepcopy(options))
    vars(optimizer.loss_scaler).update(saved["loss_scaler"])
    optimizer.spread()


def fits_own(optimizer: "SDPOptimizer", saved: Mapping[str, Any]) -> bool:
    """Whether :func:`take_own_state` takes it on this rank."""
    return bool(saved["sdp_layout"] == _layout(optimizer))


def _layout(optimizer: "SDPOptimizer") -> dict[str, Any]:
    """By which a state is told from that of another rank, plan, stage or bucket size."""
    return {
        "rank": dist.get_rank(),
        "ranks": dist.get_world_size(),
        "zero_stage": optimizer.stage,
        "parameters": optimizer.identity,
        "buckets": digest([(bucket.numels, bucket.owners.ranks, bucket.shard_numel) for bucket in optimizer.masters]),
    }


def _check(saved: Any, own: Mapping[str, Any]) -> None:
    if not isinstance(saved, Mapping) or not saved.keys() >= _KEYS:
        raise CheckpointError(
            "optimizer.load_state_dict: got no state of an SDP optimizer; takes what optimizer.state_dict() gave on "
            "this rank (engine.load_checkpoint takes any layout's)"
        )
    for key, value in own.items():
        if saved["sdp_layout"].get(key) != value:
            raise CheckpointError(
                f"optimizer.load_state_dict: got a state whose {key} is {saved['sdp_layout'].get(key)!r}; takes "
                f"{value!r}, of this rank and layout (engine.load_checkpoint takes any layout's)"
            )


def _like(value: Any, master: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    # Counts of steps stay where they were; some optimizers keep them on the CPU.
    return value.to(master.device, copy=True) if value.shape == master.shape else value.clone()
