"""A linear layer of which a worker holds a few chunks, each with owners of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from deepspeed_sdp.adapters import PartitionedTensor


@dataclass(frozen=True)
class LinearForm:
    """How the weight of a linear falls into units.

    Attributes:
        cut: along its outputs or its inputs.
        is_transposed: whether it is ``[in, out]``, as in transformers' ``Conv1D``, instead of ``[out, in]``.
        groups: the outputs are so many equal parts, in each of which every unit has features.
    """

    cut: Literal["out", "in"]
    is_transposed: bool = False
    groups: int = 1

    @property
    def dim(self) -> int:
        """The dimension of a weight along which units lie; with ``groups`` they are a dimension before it."""
        return int((self.cut == "in") != self.is_transposed) + (self.groups > 1)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """``[out, in]``; a view."""
        if self.groups > 1:
            weight = weight.flatten(self.dim - 1, self.dim)
        return weight.t() if self.is_transposed else weight


class SubnetworkLinear(nn.Module):
    """Chunks of one linear layer, each a parameter of its own, since a parameter has one owner set.

    ``cut="out"``: the chunks' outputs are concatenated; ``[..., in] -> [..., sum of chunk widths]``, with groups within
    each of them.
    ``cut="in"``: the input is split over the chunks, ``[..., sum of chunk widths] -> [..., out]``, their sum is
    multiplied by ``scale`` (output scaling acts on what the units add to the residual stream, so not on the bias).

    Weights are never concatenated: that would cost a second copy of them, kept for the backward pass.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter], form: LinearForm, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)
        self.form = form
        self.scale = scale
        self.widths = [weight.shape[form.dim] for weight in weights]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [self.form.matrix(weight) for weight in self.weights]
        if self.form.cut == "out":
            biases = [bias.flatten() for bias in self.biases] or [None] * len(weights)
            outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            if len(outputs) == 1:
                return outputs[0]
            if self.form.groups == 1:
                return torch.cat(outputs, dim=-1)
            return torch.cat([in_groups(o, -1, self.form.groups) for o in outputs], dim=-1).flatten(-2)
        pieces = torch.split(x, self.widths, dim=-1)
        output = F.linear(pieces[0], weights[0])
        for piece, weight in zip(pieces[1:], weights[1:], strict=True):
            output = output + F.linear(piece, weight)
        if self.scale != 1.0:
            output = output * self.scale
        for bias in self.biases:
            output = output + bias
        return output

    def extra_repr(self) -> str:
        return f"cut={self.form.cut}, widths={self.widths}, scale={self.scale:g}"


def form_of(linear: nn.Module, weight: PartitionedTensor) -> LinearForm:
    """How a linear layer whose weight is cut so falls into units."""
    is_transposed = isinstance(linear, Conv1D)
    return LinearForm("out" if (weight.dim == 0) != is_transposed else "in", is_transposed, weight.groups)


def weight_and_bias(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The parameters of a linear layer."""
    assert isinstance(linear, nn.Linear | Conv1D)
    return linear.get_parameter("weight"), None if linear.bias is None else linear.get_parameter("bias")


def in_groups(value: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    """``dim`` as two: groups, and features of each; a view. One group is no dimension of its own."""
    return value if groups == 1 else torch.unflatten(value, dim, (groups, -1))
