"""How a basic optimizer steps and what it remembers, found out on a few numbers before it steps a model's.

What it steps are flat shards of many parameters at once (:mod:`deepspeed_sdp.engine.zero.owner_bucket`). So the update
of an element may depend on that element's own weight, gradients and state, and on nothing else. No list of names says
which optimizers are like that, and how they count: they are tried.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.errors import ConfigError

GROUP_KEY = "sdp_group"

# Enough for optimizers that quantise the state of large parameters in blocks.
_NUMEL, _STEPS, _LR = 4096, 3, 1e-2

# Implementations round differently, and an update by sign jumps where they do.
_TOLERANCE, _JUMPS = 1e-3, 0.01

_TAKES = "takes an element-wise optimizer (AdamW, Lion, SGD, ...)"


@dataclass(frozen=True)
class Kept:
    """One entry of a parameter's state.

    Attributes:
        kind: ``torch.Tensor``, ``int``, ``float`` or ``bool``.
        by_element: whether it is a tensor of the parameter's shape; otherwise it is a number.
        dtype, device: of a tensor, where the parameter lies as in :func:`behaviour_of`.
    """

    kind: type
    by_element: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def number(self, value: Any) -> Any:
        """``value`` as the optimizer wants it."""
        if self.kind is torch.Tensor:
            return torch.tensor(value, dtype=self.dtype, device=self.device)
        return self.kind(value)


@dataclass(frozen=True)
class Behaviour:
    """What :func:`behaviour_of` finds.

    Attributes:
        steps_by_parts: whether some parameters can be stepped at a time, in a call of ``step`` each.
        state: by the index of the client's group, what is remembered of each of its parameters, by key.
    """

    steps_by_parts: bool
    state: Mapping[int, Mapping[str, Kept]]

    def keys(self, by_element: bool) -> list[str]:
        """Keys of all groups, of tensors of the parameter's shape or of numbers."""
        return sorted({key for of in self.state.values() for key, kept in of.items() if kept.by_element == by_element})


def behaviour_of(optimizer: torch.optim.Optimizer, device: torch.device) -> Behaviour:
    """Step parameters of its own with ``optimizer``, which is afterwards as before.

    Args:
        optimizer: its groups carry ``GROUP_KEY``; its state may be what its constructor made.
        device: where it will step.

    Raises:
        ConfigError: its update of an element depends on more than the element, or its state is neither numbers nor
            tensors of the parameter's shape.
    """
    name = type(optimizer).__name__
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ConfigError(f"optimizer: got {name}, which swaps weights for evaluation by train() and eval(); {_TAKES}")
    initial = next((constants(state) for state in optimizer.state.values() if state), {})
    known: dict[str, tuple[bool, dict[str, Kept]]] = {}
    of_groups: dict[int, dict[str, Kept]] = {}
    with _undisturbed(optimizer, device):
        for group in list(optimizer.param_groups):
            options = {k: v for k, v in group.items() if k not in ("params", "param_names", "name", GROUP_KEY)}
            signature = repr(sorted((k, v) for k, v in options.items() if k not in ("lr", "initial_lr")))
            if (rate := options.get("lr")) is not None:  # a warm-up may begin at 0, where nothing would be seen
                options["lr"] = torch.full_like(rate, _LR) if isinstance(rate, torch.Tensor) else _LR
            if signature not in known:
                try:
                    known[signature] = _try(optimizer, options, initial, device)
                except ConfigError:
                    raise
                except Exception as error:
                    why = next(iter(str(error).splitlines()), "")
                    raise ConfigError(
                        f"optimizer: {name} cannot step flat weights ({type(error).__name__}: {why}); {_TAKES}"
                    ) from error
            of_groups[group[GROUP_KEY]] = known[signature][1]
    return Behaviour(all(by_parts for by_parts, _ in known.values()), of_groups)


def constants(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as its optimizer's constructor made it: numbers, and the value of each constant tensor.

    Raises:
        ConfigError: a tensor is not constant, or something has been counted: the optimizer has stepped.
    """
    found = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise ConfigError(
                "optimizer: keeps state of parameters on the meta device; takes a callable that makes the optimizer, "
                'or one in the DeepSpeed config ("optimizer")'
            )
        is_tensor = isinstance(value, torch.Tensor)
        if float(value) if key == "step" else is_tensor and value.numel() and (value != value.reshape(-1)[0]).any():
            raise ConfigError("optimizer: has state already; takes an optimizer that has not stepped")
        found[key] = value.reshape(-1)[:1] if is_tensor and value.dim() else value
    return found


def state_like(initial: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """What :func:`constants` returned, as the state of ``parameter``."""
    return {
        key: torch.full_like(parameter, float(value), dtype=value.dtype)
        if isinstance(value, torch.Tensor) and value.dim()
        else copy.deepcopy(value)
        for key, value in initial.items()
    }


@contextmanager
def _undisturbed(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    attributes = dict(vars(optimizer))
    # What a client's own step() counts in, in place.
    for key, value in attributes.items():
        if isinstance(value, list | dict | set | torch.Tensor):
            setattr(optimizer, key, value.clone() if isinstance(value, torch.Tensor) else copy.copy(value))
    # Hooks are the client's, for its own steps.
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if hooks in attributes:
            setattr(optimizer, hooks, OrderedDict())
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]), torch.no_grad():
            yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)


def _try(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], initial: Mapping[str, Any], device: torch.device
) -> tuple[bool, dict[str, Kept]]:
    name = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    # Pieces of different size, so that whatever is taken over a whole parameter or group differs too.
    sizes = torch.tensor([1.0, 16.0]).view(2, 1)
    values = (torch.randn(2, _NUMEL, generator=generator) * sizes).to(device)
    gradients = (torch.randn(_STEPS, 2, _NUMEL, generator=generator) * sizes**2).to(device)

    def step(
        pieces: Sequence[int], shape: tuple[int, ...] = (_NUMEL,), count: int = 1, parts: bool = False
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Parameters made of ``count`` pieces each."""
        joined = [slice(place, place + count) for place in pieces[::count]]
        of_steps = [[gradient[place].reshape(shape) for place in joined] for gradient in gradients]
        return _run(optimizer, options, initial, [values[place].reshape(shape) for place in joined], of_steps, parts)

    alone = torch.cat([step([0])[0], step([1])[0]])
    if _is_same(alone, values.reshape(-1), values):
        raise ConfigError(f"optimizer: got {name}, whose step() does not update the parameters of its groups; {_TAKES}")
    together, state = step([0, 1])
    whole, _ = step([0, 1], (64, -1), count=2)
    if not _is_same(alone, together, values) or not _is_same(alone, whole, values):
        raise ConfigError(
            f"optimizer: got {name}, whose update of an element depends on others; subnetworks and ZeRO step parts of "
            f"weights: {_TAKES}"
        )
    kept = {key: _kept(name, key, value) for key, value in state.items() if value is not None}
    return _is_same(alone, step([0, 1], parts=True)[0], values), kept


def _run(
    optimizer: torch.optim.Optimizer,
    options: Mapping[str, Any],
    initial: Mapping[str, Any],
    values: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
    by_parts: bool,
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """The parameters after a step with each of ``gradients``, and the state of the last one."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer.param_groups = [{**options, "params": parameters}]
    optimizer.state = defaultdict(dict)
    for parameter in parameters if initial else ():
        optimizer.state[parameter].update(state_like(initial, parameter))
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        for call in [[p] for p in parameters] if by_parts else [parameters]:
            optimizer.param_groups[0]["params"] = call
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in parameters]), optimizer.state[parameters[-1]]


def _is_same(one: torch.Tensor, other: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether ``start`` was moved to the same place, up to rounding."""
    moved, also = one - start.reshape(-1), other - start.reshape(-1)
    differs = (moved - also).abs() > _TOLERANCE * moved.abs().clamp(min=float(moved.abs().median()))
    return float(differs.float().mean()) < _JUMPS


def _kept(name: str, key: str, value: Any) -> Kept:
    if isinstance(value, bool | int | float):
        return Kept(type(value))
    if type(value) is torch.Tensor:
        if value.numel() == 1:
            return Kept(torch.Tensor, False, value.dtype, value.device)
        if value.shape == (_NUMEL,) and value.is_floating_point():
            return Kept(torch.Tensor, True, value.dtype, value.device)
    form = f"{type(value).__name__} {list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else value
    raise ConfigError(
        f"optimizer: got {name}, which keeps {key!r} of a parameter of {_NUMEL} elements as {form}; takes one whose "
        "state is numbers and floating-point tensors of the parameter's shape (not quantised, not factored)"
    )
