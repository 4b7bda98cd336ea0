"""Bytes of model state, measured on live tensors; for SDP engines and plain DeepSpeed engines alike."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_sdp.engine.zero.freed_weight import FreedWeight


def model_state_bytes(engine: Any) -> dict[str, int]:
    """Bytes that this rank holds now: ``weights``, ``gradients``, ``optimizer``, ``total``.

    Weights are the storages of parameters and buffers, padding included. The optimizer is its state and the master
    weights, unless they are the weights themselves. Gradients change within a step: see :func:`gradient_peak`.
    """
    held: list[torch.Tensor] = getattr(engine.optimizer, "weight_tensors", list)()
    # DeepSpeed's own ZeRO-3 keeps a parameter's shard beside it.
    held += [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    there = [p for p in engine.module.parameters() if not isinstance(p, FreedWeight)]
    weights = _storages([*there, *engine.module.buffers(), *held])
    optimizer = {k: v for k, v in _storages(_optimizer_tensors(engine)).items() if k not in weights}
    sizes = {
        "weights": sum(weights.values()),
        "gradients": gradient_bytes(engine),
        "optimizer": sum(optimizer.values()),
    }
    return {**sizes, "total": sum(sizes.values())}


def gradient_bytes(engine: Any) -> int:
    """Bytes of all live gradient tensors: of parameters, accumulated, reduced, and of master weights."""
    tensors = {(t.data_ptr(), t.numel()): t for t in _gradient_tensors(engine) if t.numel()}
    return sum(t.nbytes for t in tensors.values()) + getattr(engine.optimizer, "in_flight_bytes", 0)


@dataclass
class Peak:
    """The largest number of bytes seen."""

    nbytes: int = 0


@contextmanager
def gradient_peak(engine: Any) -> Iterator[Peak]:
    """Watch :func:`gradient_bytes` at every gradient of the backward passes inside and at updates; slow."""
    peak = Peak()

    def look(beside: int = 0) -> None:
        peak.nbytes = max(peak.nbytes, gradient_bytes(engine) + beside)

    # The gradient at hand is not attached to its parameter yet.
    hooks = [
        p.register_hook(lambda gradient: look(gradient.nbytes)) for p in engine.module.parameters() if p.requires_grad
    ]
    hooks.append(engine.basic_optimizer.register_step_pre_hook(lambda *_: look()))
    try:
        yield peak
    finally:
        for hook in hooks:
            hook.remove()
    look()


def _optimizer_tensors(engine: Any) -> Iterator[torch.Tensor]:
    basic, parts = engine.basic_optimizer, getattr(engine, "_parts", None)
    if parts is not None and parts.outer is not None:
        yield from parts.outer.tensors()
    for group in basic.param_groups:
        yield from group["params"]
    # DeepSpeed's own ZeRO-3 hands its master weights to the basic optimizer only while it steps.
    yield from getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())
    for state in basic.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _gradient_tensors(engine: Any) -> Iterator[torch.Tensor]:
    if hasattr(engine.optimizer, "gradient_tensors"):
        yield from engine.optimizer.gradient_tensors()
    else:
        for grads in (getattr(engine.optimizer, "averaged_gradients", None) or {}).values():
            yield from grads or ()
    for parameter in engine.module.parameters():
        yield from (t for t in (parameter.grad, getattr(parameter, "grad_accum", None)) if t is not None)
    for group in engine.basic_optimizer.param_groups:
        yield from (p.grad for p in group["params"] if p.grad is not None)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages.pop(0, None)
    return storages
