"""What a client's optimizer, groups and scheduler are, as plain data that ranks can compare."""

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY

# Tensors of options are few numbers; of longer ones the sum is told.
_FEW = 16


def describe_optimizer(optimizer: Any, name: str = "optimizer") -> dict[str, Any]:
    """Class, options outside of groups, and options of every group, by dotted key; of a callable as of a scheduler."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return describe_scheduler(optimizer, name)
    # Numbers and switches; a counter of the process's optimizers, or the maker of its CPU, is none of its options.
    own = {
        key: value
        for key, value in vars(optimizer).items()
        if isinstance(value, bool | int | float) and not key.startswith("_") and not key.endswith("_id")
    }
    return {
        name: _name_of(type(optimizer)),
        **{f"{name}.{key}": value for key, value in sorted(own.items())},
        **describe_options(optimizer.param_groups, f"{name}.param_groups"),
    }


def describe_options(groups: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Every option of every group but its parameters: ``<name>[1].lr``."""
    return {
        f"{name}[{index}].{key}": describe(value)
        for index, group in enumerate(groups)
        for key, value in sorted(group.items())
        if key not in ("params", "param_names", GROUP_KEY)
    }


def describe_scheduler(scheduler: Any, name: str = "lr_scheduler") -> dict[str, Any]:
    """Class and options, those of schedulers inside it too; of a callable what it is called, or its arguments."""
    if scheduler is None:
        return {}
    if isinstance(scheduler, types.FunctionType):
        return {name: _name_of(scheduler)}
    described = describe(scheduler)
    return _dotted(described, name) if isinstance(described, dict) else {name: described}


def describe_module(module: nn.Module) -> str:
    """Shapes and dtypes of all parameters, as a digest: the list is as long as the model."""
    listed = [(name, tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()]
    dtypes = sorted({dtype.removeprefix("torch.") for _, _, dtype in listed})
    return f"{len(listed)} of {', '.join(dtypes)} ({digest(listed)})"


def digest(value: Any) -> str:
    """A few characters that differ where ``repr(value)`` does."""
    return f"digest {hashlib.sha256(repr(value).encode()).hexdigest()[:8]}"


def describe(value: Any, depth: int = 4) -> Any:
    """JSON data, without anything that differs between processes."""
    if _is_plain(value):
        return value
    if isinstance(value, torch.Tensor):
        is_told = value.numel() <= _FEW and not value.is_meta
        return value.tolist() if is_told else f"{list(value.shape)} of {value.dtype}"
    if depth == 0:
        return _name_of(type(value))
    if isinstance(value, Mapping):
        return {str(key): describe(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [describe(inner, depth - 1) for inner in value]
    if isinstance(value, functools.partial):
        return {
            "class": _name_of(value.func),
            "args": describe(value.args, depth - 1),
            "keywords": describe(value.keywords, depth - 1),
        }
    if isinstance(value, types.FunctionType):
        return _function(value, depth)
    if isinstance(value, type) or callable(value):
        return _name_of(value)
    if hasattr(value, "step") and not isinstance(value, torch.optim.Optimizer):
        # What is not plain may hold an optimizer, or methods that torch has wrapped.
        inner = {k: v for k, v in vars(value).items() if k != "optimizer" and not isinstance(v, types.MethodType)}
        return {"class": _name_of(type(value)), **{k: describe(v, depth - 1) for k, v in sorted(inner.items())}}
    return _name_of(type(value))


def _function(function: types.FunctionType, depth: int) -> str:
    """Its name, and a digest of what it computes with: constants, defaults and closure."""
    cells = [describe(cell.cell_contents, depth - 1) for cell in function.__closure__ or () if _is_filled(cell)]
    code = function.__code__
    constants = [constant for constant in code.co_consts if _is_plain(constant)]
    made_of = (code.co_code, constants, code.co_names, describe(function.__defaults__, depth - 1), cells)
    return f"{_name_of(function)} ({digest(made_of)})"


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _name_of(thing: type | Callable[..., Any]) -> str:
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _dotted(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``<name>`` is the class, ``<name>._schedulers[1].T_max`` an option of one inside."""
    dotted: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and all(isinstance(inner, dict) for inner in value):
            for index, inner in enumerate(value):
                dotted.update(_dotted(inner, f"{name}.{key}[{index}]"))
        else:
            dotted[name if key == "class" else f"{name}.{key}"] = value
    return dotted
