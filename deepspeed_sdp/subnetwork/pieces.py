"""Tensors of modules that are no linears, cut: convolutions, norms, tables.

A worker may hold several pieces of such a tensor, each a parameter of its own, since a parameter has one owner set. The
module stays of its class and its forward pass what it was: for as long as that takes, the tensor made of the pieces
stands under the parameter's name.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters import PartitionedTensor
from deepspeed_sdp.plan import Chunk
from deepspeed_sdp.subnetwork.cutting import Cutting
from deepspeed_sdp.subnetwork.layout import FullParameter

Ranges = tuple[tuple[int, int], ...]


def cut_tensors(cutting: Cutting, name: str, tensors: Sequence[PartitionedTensor], owned: Sequence[Chunk]) -> None:
    """Leave of ``tensors`` of the module ``name`` what this worker owns, ``owned``: one chunk or more."""
    module = cutting.module.get_submodule(name)
    for tensor in tensors:
        full = cutting.full.by_unit[tensor.name]
        fragments = [full.fragment(chunk.start, chunk.stop, chunk.owner_set) for chunk in owned]
        if tensor.local in module._buffers:
            value = module.get_buffer(tensor.local)
            module._buffers[tensor.local] = torch.cat([full.part_of(value, f) for f in fragments], full.unit_dim)
            cutting.buffers[tensor.name] = (full, tuple(fragments))
            continue
        cutting.partitioned[tensor.name] = full
        parameter = module.get_parameter(tensor.local)
        pieces = [cutting.slice(parameter, fragment) for fragment in fragments]
        if len(pieces) == 1:
            module.register_parameter(tensor.local, pieces[0])
            cutting.fragments[tensor.name] = fragments[0]
            continue
        module.register_parameter(tensor.local, None)
        _hold(module, tensor.local, pieces, _Joined(tensor.local, full.unit_dim))
        for index, fragment in enumerate(fragments):
            cutting.fragments[f"{pieces_name(tensor.name)}.{index}"] = fragment
    _count(module, tensors, sum(chunk.stop - chunk.start for chunk in owned))


def mask_tensor(cutting: Cutting, full: FullParameter, owned: Sequence[Chunk]) -> None:
    """Leave gradients to what this worker owns of a parameter that it holds whole, ``owned``: one chunk or more."""
    path, _, local = full.name.rpartition(".")
    module = cutting.module.get_submodule(path)
    parameter = module.get_parameter(local)
    is_trained = parameter.requires_grad
    parameter.requires_grad_(False)
    fragments = [full.fragment(chunk.start, chunk.stop, chunk.owner_set) for chunk in owned]
    views = [nn.Parameter(full.part_of(parameter.detach(), f), requires_grad=is_trained) for f in fragments]
    ranges = tuple((f.start, f.stop) for f in fragments)
    _hold(module, local, views, _Spliced(local, full.unit_dim, ranges))
    cutting.client.replaced[id(parameter)] += views
    for index, fragment in enumerate(fragments):
        cutting.fragments[f"{pieces_name(full.name)}.{index}"] = fragment
        cutting.views[f"{pieces_name(full.name)}.{index}"] = full.name


def pieces_name(name: str) -> str:
    """Name of the list of the pieces of a parameter."""
    return f"{name}_pieces"


class _Joined:
    """Puts the pieces of a tensor together before a forward pass.

    Not held apart from each other, as a linear's are: beside what a convolution keeps of its maps, a second copy of its
    weight is little.
    """

    def __init__(self, local: str, dim: int) -> None:
        self.local, self.dim = local, dim

    def __call__(self, module: nn.Module, _: Any) -> None:
        pieces: Any = module.get_submodule(pieces_name(self.local))
        module.__dict__[self.local] = torch.cat(list(pieces), self.dim)


class _Spliced:
    """Lets gradients of a whole tensor reach the views of it that are trained."""

    def __init__(self, local: str, dim: int, ranges: Ranges) -> None:
        self.local, self.dim, self.ranges = local, dim, ranges

    def __call__(self, module: nn.Module, _: Any) -> None:
        views: Any = module.get_submodule(pieces_name(self.local))
        whole = module._parameters[self.local]
        module.__dict__[self.local] = _Splice.apply(whole, self.dim, self.ranges, *views)  # type: ignore[no-untyped-call]


class _Away:
    """After a forward pass, also one that fails: the parameter is there again, or nothing."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(self.local, None)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, dim: int, ranges: Ranges, *views: torch.Tensor) -> torch.Tensor:
        ctx.dim, ctx.ranges = dim, ranges
        return whole.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = [grad.narrow(ctx.dim, start, stop - start).contiguous() for start, stop in ctx.ranges]
        return None, None, None, *parts


def _hold(module: nn.Module, local: str, pieces: Sequence[nn.Parameter], before: Any) -> None:
    module.register_module(pieces_name(local), nn.ParameterList(pieces))
    module.register_forward_pre_hook(before)
    module.register_forward_hook(_Away(local), always_call=True)


def _count(module: nn.Module, tensors: Sequence[PartitionedTensor], units: int) -> None:
    """What a module says of its own size."""
    if isinstance(module, nn.Conv2d):
        attribute = "in_channels" if tensors[0].dim else "out_channels"
    elif hasattr(module, "num_features"):
        attribute = "num_features"
    else:
        return
    setattr(module, attribute, units * tensors[0].width)
