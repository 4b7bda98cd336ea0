"""A linear layer whose forward pass is dense, and of which only the owned features get a gradient."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

Cut = Literal["out", "in"]
Ranges = tuple[tuple[int, int], ...]


class MaskedLinear(nn.Module):
    """``nn.Linear`` under backward masking: ``[..., in] -> [..., out]``.

    The forward pass and the gradient of the input are the full layer's, one matmul each. Gradients of the weight exist
    for the owned features alone, and come out of one matmul whatever the number of ranges. What only the gradient
    of other features would need is not kept for the backward pass.

    Args:
        linear: the full layer. Its parameters stay the same objects; what falls into units takes no gradient any more.
        cut: the dimension that falls into units: rows (``"out"``) or columns (``"in"``) of the weight.
        ranges: half-open ranges of owned features along it, ascending, each with owners of its own; at least one.
        is_input_kept: whether the backward pass of something else keeps the input anyway. Columns then refer to it;
            otherwise they keep a copy of their own part, so that the rest can be freed.

    Attributes:
        weight: ``[out, in]``, full.
        bias: ``[out]`` or ``None``. With an ``"out"`` cut it falls into units too; else all workers train it.
        weights, biases: the owned features, one parameter for each range; views of ``weight`` and ``bias``.
    """

    def __init__(
        self, linear: nn.Linear, cut: Cut, ranges: Sequence[tuple[int, int]], is_input_kept: bool = False
    ) -> None:
        super().__init__()
        self.is_input_kept = is_input_kept
        self.cut = cut
        self.ranges: Ranges = tuple(ranges)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weights = _views(self.weight, 0 if cut == "out" else 1, self.ranges)
        self.biases = nn.ParameterList()
        if cut == "out" and self.bias is not None:
            self.biases = _views(self.bias, 0, self.ranges)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        output: torch.Tensor = _DenseForward.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.cut, self.ranges, self.is_input_kept, *self.weights, *self.biases
        )
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, cut={self.cut}, owned={self.ranges}"


def _views(full: torch.Tensor, dim: int, ranges: Ranges) -> nn.ParameterList:
    is_trained = full.requires_grad
    full.requires_grad_(False)
    return nn.ParameterList(
        nn.Parameter(full.detach().narrow(dim, start, stop - start), requires_grad=is_trained) for start, stop in ranges
    )


class _DenseForward(torch.autograd.Function):
    """``F.linear`` that gives gradients to views of its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        cut: Cut,
        ranges: Ranges,
        is_input_kept: bool,
        *views: torch.Tensor,
    ) -> torch.Tensor:
        # Rows of the weight need all of the input for their gradient, columns only their own part of it.
        needed = x
        if cut == "in" and not is_input_kept:
            needed = select(x, ranges).contiguous()
        ctx.save_for_backward(needed, weight)
        ctx.cut, ctx.ranges, ctx.has_bias, ctx.is_selected = cut, ranges, bias is not None, needed is not x
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed, weight = ctx.saved_tensors
        widths = [stop - start for start, stop in ctx.ranges]
        needs = ctx.needs_input_grad
        # Under autocast the gradient comes in another dtype than the weight.
        dtype = grad.dtype
        grad_x = (grad @ weight.to(dtype)).to(needed.dtype) if needs[0] else None
        grad_bias = sum_rows(grad) if needs[2] else None
        if not any(needs[6:]):
            return grad_x, None, grad_bias, *(None for _ in needs[3:])
        if ctx.cut == "in" and not ctx.is_selected:
            needed = select(needed, ctx.ranges)
        needed = needed.reshape(-1, needed.shape[-1]).to(dtype)
        if ctx.cut == "out":
            grad = select(grad, ctx.ranges)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t() @ needed
        pieces = list(torch.split(grad_weight, widths, dim=0 if ctx.cut == "out" else 1))
        if ctx.cut == "out" and ctx.has_bias:
            pieces += torch.split(sum_rows(rows), widths)
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
