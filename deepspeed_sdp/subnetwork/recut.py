"""Another worker's subnetwork, or another plan's, in the place of one: the model object stays what it was."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters import BlockUnit
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork.cut import OutputScaling, cut_model
from deepspeed_sdp.subnetwork.materialize import family_buffers
from deepspeed_sdp.subnetwork.subnetwork import Masking, Subnetwork

# Of nn.Module: where hooks are. A handle that takes one off refers to the very dict.
_HOOKS = (
    "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


def recut(
    old: Subnetwork,
    plan: SubnetworkPlan,
    index: int,
    *,
    masking: Masking,
    output_scaling: OutputScaling,
    block_unit: BlockUnit | None,
    recompute_frozen: bool,
    group_of: Mapping[str, int],
) -> Subnetwork:
    """The subnetwork of worker ``index`` under ``plan``, of the full model that ``old`` was cut from.

    A model of its own: parameters are on the meta device, buffers on that of the old ones, with their values. See
    :func:`~deepspeed_sdp.subnetwork.cut.cut_model` for the arguments.

    Raises:
        ModelError: the plan was made for other shapes, or a buffer that this worker did not have cannot be made.
    """
    model: Any = old.full.new_skeleton()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in old.full.trainable)
    made = cut_model(
        model,
        plan,
        index,
        masking=masking,
        output_scaling=output_scaling,
        block_unit=block_unit,
        recompute_frozen=recompute_frozen,
        adapter=old.adapter,
    )
    root: Any = old.module
    if getattr(root, "config", None) is not None:
        root_config, config = root.config, model.config
        for module in model.modules():
            if module.__dict__.get("config") is config:
                module.__dict__["config"] = root_config
    _take_buffers(old.module, model)
    model.train(old.module.training)
    return replace(made, full=old.full, group_of=dict(group_of))


def graft(root: nn.Module, made: Subnetwork) -> Subnetwork:
    """Let ``root``, the model of the old subnetwork, be the new one.

    Modules inside it are others. What a client put on one of the same name and class is on the new one too: hooks,
    whose handles still take them off, gradient checkpointing, ``compile()``.
    """
    old, new = dict(root.named_modules()), dict(made.module.named_modules())
    compute = next(
        (m._gradient_checkpointing_func for m in old.values() if hasattr(m, "_gradient_checkpointing_func")), None
    )
    is_checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in old.values())
    for name, module in new.items():
        if is_checkpointing and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = compute
        before = old.get(name)
        if before is None or type(before) is not type(module):
            continue
        for kind in _HOOKS:
            kept = before.__dict__[kind]
            for key, hook in list(kept.items()):
                if _is_own(hook):
                    del kept[key]
            kept.update(module.__dict__[kind])
            module.__dict__[kind] = kept
        if before._compiled_call_impl is not None and name:
            module.compile()
    for kind in ("_modules", "_parameters", "_buffers"):
        held = root.__dict__[kind]
        held.clear()
        held.update(made.module.__dict__[kind])
    return replace(made, module=root)


def give_memory(module: nn.Module, make: Callable[[str, nn.Parameter], torch.Tensor]) -> None:
    """Parameters on the meta device become real ones, with the memory that ``make`` gives for a name; ties stay."""
    fresh: dict[int, nn.Parameter] = {}
    for path, part in module.named_modules():
        for local, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fresh:
                value = make(f"{path}.{local}" if path else local, parameter)
                fresh[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            part._parameters[local] = fresh[id(parameter)]


def _is_own(hook: Any) -> bool:
    # Flags of a hook, as whether it takes keywords, are numbers in a dict beside it.
    return str(getattr(hook, "__module__", "")).startswith("deepspeed_sdp.")


def _take_buffers(old: nn.Module, new: nn.Module) -> None:
    held = dict(old.named_buffers())
    like = next(iter(held.values()), None)
    for path, module in new.named_modules():
        names = [(local, f"{path}.{local}" if path else local) for local, _ in module.named_buffers(recurse=False)]
        missing = [
            local for local, name in names if name not in held or held[name].shape != module._buffers[local].shape
        ]
        if missing:
            family_buffers(new, module)
        for local, name in names:
            if local not in missing:
                module._buffers[local] = held[name]
                continue
            buffer = module._buffers[local]
            assert buffer is not None
            if buffer.is_floating_point():
                if math.isnan(float(buffer.sum())):
                    raise ModelError(
                        f"model: buffer {name}, which this rank did not hold before, gets no value from "
                        f"{type(new).__name__}._init_weights; takes a plan that leaves the rank what it has of it"
                    )
                if like is not None and like.is_floating_point():
                    buffer = buffer.to(like.dtype)
            module._buffers[local] = buffer if like is None else buffer.to(like.device)
