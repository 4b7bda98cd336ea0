"""Cutting at block granularity: a residual block is owned whole, or absent.

Everything in an owned block belongs to its owners, its biases and its input norm too. A block that is not owned is the
identity on the residual stream; it has no parameters, and its input norm is not computed.
"""

from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters import Block
from deepspeed_sdp.subnetwork.cutting import Cutting, replace_module
from deepspeed_sdp.subnetwork.layout import FullParameter


def cut_block(cutting: Cutting, block: Block, scale: float) -> None:
    """Keep or remove ``block``; ``scale`` multiplies what an owned one adds to the residual stream."""
    model, space = cutting.module, block.space
    names = (space.name, *block.norms)
    owned = cutting.plan.owned(space.name, cutting.index)
    for name in names:
        for local, parameter in model.get_submodule(name).named_parameters():
            full_name = f"{name}.{local}"
            # One unit, as wide as the parameter.
            shape = tuple(parameter.shape)
            full = FullParameter(full_name, shape, 0, shape[0], space.name)
            cutting.partitioned[full_name] = full
            if owned:
                cutting.fragments[full_name] = full.fragment(0, 1, owned[0].owner_set)
            else:
                cutting.client.replaced.setdefault(id(parameter), [])
    if not owned:
        _remove(cutting, block)
    elif scale != 1.0:
        hook = _scale_layer(scale) if space.kind == "layer" else scale_output(scale)
        model.get_submodule(space.name).register_forward_hook(hook, with_kwargs=space.kind == "layer")


def _remove(cutting: Cutting, block: Block) -> None:
    model = cutting.module
    layer = model.get_submodule(block.space.name)
    absent = cutting.full.adapter.absent(block.space.kind, layer)()
    if hasattr(layer, "attention_type"):  # the model asks its layers which attention mask they take
        absent.attention_type = layer.attention_type
    replace_module(model, block.space.name, absent)
    for norm in block.norms:
        replace_module(model, norm, nn.Identity())


def scale_output(scale: float) -> Any:
    """A forward hook that multiplies what a branch adds to the residual stream."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * scale, *output[1:])
        return output * scale

    return hook


def _scale_layer(scale: float) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        residual: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (residual + scale * (output[0] - residual), *output[1:])
        return residual + scale * (output - residual)

    return hook
