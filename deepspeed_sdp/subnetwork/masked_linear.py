"""A linear layer whose forward pass is dense, and of which only the owned features get a gradient."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deepspeed_sdp.subnetwork.linear import LinearForm, in_groups, weight_and_bias

Ranges = tuple[tuple[int, int], ...]


class MaskedLinear(nn.Module):
    """A linear layer under backward masking: ``[..., in] -> [..., out]``.

    The forward pass and the gradient of the input are the full layer's, one matmul each. Gradients of the weight exist
    for the owned features alone, and come out of one matmul whatever the number of ranges. What only the gradient
    of other features would need is not kept for the backward pass.

    Args:
        linear: the full layer. Its parameters stay the same objects; what falls into units takes no gradient any more.
        form: how it falls into units.
        ranges: half-open ranges of owned features along the units, ascending, each with owners of its own; at least
            one. With ``form.groups`` they count within each group.
        is_input_kept: whether the backward pass of something else keeps the input anyway. Columns then refer to it;
            otherwise they keep a copy of their own part, so that the rest can be freed.

    Attributes:
        weight: full, as in ``linear``.
        bias: ``[out]`` or ``None``. With an ``"out"`` cut it falls into units too; else all workers train it.
        weights, biases: the owned features, one parameter for each range; views of ``weight`` and ``bias``.
        features: ranges of all owned features.
    """

    def __init__(
        self, linear: nn.Module, form: LinearForm, ranges: Sequence[tuple[int, int]], is_input_kept: bool = False
    ) -> None:
        super().__init__()
        self.is_input_kept = is_input_kept
        self.form = form
        self.weight, self.bias = weight_and_bias(linear)
        of_group = self.weight.shape[0 if form.is_transposed == (form.cut == "in") else 1] // form.groups
        # Of each owned range the features in every group.
        self.ranges = tuple(
            tuple((group * of_group + start, group * of_group + stop) for group in range(form.groups))
            for start, stop in ranges
        )
        self.features = tuple(part for parts in self.ranges for part in parts)
        weight = in_groups(self.weight.detach(), form.dim - (form.groups > 1), form.groups)
        self.weights = _views(self.weight, weight, form.dim, ranges)
        self.biases = nn.ParameterList()
        if form.cut == "out" and self.bias is not None:
            self.biases = _views(self.bias, in_groups(self.bias.detach(), 0, form.groups), -1, ranges)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        form = LinearForm(self.form.cut, self.form.is_transposed)
        if not torch.is_grad_enabled():
            return F.linear(x, form.matrix(self.weight), self.bias)
        # As lists: older versions of Dynamo cannot unpack a ParameterList.
        views = list(self.weights) + list(self.biases)
        output: torch.Tensor = _DenseForward.apply(  # type: ignore[no-untyped-call]
            x, form.matrix(self.weight), self.bias, self.form, self.ranges, self.is_input_kept, *views
        )
        return output

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, cut={self.form.cut}, owned={self.ranges}"


def _views(
    parameter: nn.Parameter, full: torch.Tensor, dim: int, ranges: Sequence[tuple[int, int]]
) -> nn.ParameterList:
    is_trained = parameter.requires_grad
    parameter.requires_grad_(False)
    return nn.ParameterList(
        nn.Parameter(full.narrow(dim, start, stop - start), requires_grad=is_trained) for start, stop in ranges
    )


class _DenseForward(torch.autograd.Function):
    """``F.linear`` that gives gradients to views of its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        form: LinearForm,
        ranges: tuple[Ranges, ...],
        is_input_kept: bool,
        *views: torch.Tensor,
    ) -> torch.Tensor:
        # Rows of the matrix need all of the input for their gradient, columns only their own part of it.
        needed = x
        features = tuple(part for parts in ranges for part in parts)
        if form.cut == "in" and not is_input_kept:
            needed = select(x, features).contiguous()
        ctx.save_for_backward(needed, weight)
        ctx.form, ctx.ranges, ctx.features = form, ranges, features
        ctx.has_bias, ctx.is_selected = bias is not None, needed is not x
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed, weight = ctx.saved_tensors
        form: LinearForm = ctx.form
        widths = [sum(stop - start for start, stop in parts) for parts in ctx.ranges]
        needs = ctx.needs_input_grad
        # Under autocast the gradient comes in another dtype than the weight.
        dtype = grad.dtype
        grad_x = (grad @ weight.to(dtype)).to(needed.dtype) if needs[0] else None
        grad_bias = sum_rows(grad) if needs[2] else None
        if not any(needs[6:]):
            return grad_x, None, grad_bias, *(None for _ in needs[3:])
        if form.cut == "in" and not ctx.is_selected:
            needed = select(needed, ctx.features)
        needed = needed.reshape(-1, needed.shape[-1]).to(dtype)
        if form.cut == "out":
            grad = select(grad, ctx.features)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = needed.t() @ rows if form.is_transposed else rows.t() @ needed
        dim = form.dim - (form.groups > 1)
        pieces = [in_groups(piece, dim, form.groups) for piece in torch.split(grad_weight, widths, dim=dim)]
        if form.cut == "out" and ctx.has_bias:
            pieces += [in_groups(piece, 0, form.groups) for piece in torch.split(sum_rows(rows), widths)]
        return grad_x, None, grad_bias, None, None, None, *(piece.to(weight.dtype) for piece in pieces)


def select(x: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """``[..., features] -> [..., sum of widths]``; a view where the ranges are one."""
    merged: list[list[int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    pieces = [x[..., start:stop] for start, stop in merged]
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., features] -> [features]``."""
    return x.reshape(-1, x.shape[-1]).sum(0)
