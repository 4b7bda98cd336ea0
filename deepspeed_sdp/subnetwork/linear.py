"""A linear layer of which a worker holds a few chunks, each with owners of its own."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


class SubnetworkLinear(nn.Module):
    """Chunks of one ``nn.Linear``, each a parameter of its own, since a parameter has one owner set.

    ``cut="out"``: the chunks' outputs are concatenated; ``[..., in] -> [..., sum of chunk widths]``.
    ``cut="in"``: the input is split over the chunks, ``[..., sum of chunk widths] -> [..., out]``, their sum is
    multiplied by ``scale`` (output scaling acts on what the units add to the residual stream, so not on the bias).

    Weights are never concatenated: that would cost a second copy of them, kept for the backward pass.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter],
        cut: Literal["out", "in"],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)
        self.cut = cut
        self.scale = scale
        self.widths = [weight.shape[0 if cut == "out" else 1] for weight in weights]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = list(self.weights)
        if self.cut == "out":
            biases = list(self.biases) or [None] * len(weights)
            outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
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
        return f"cut={self.cut}, widths={self.widths}, scale={self.scale:g}"
