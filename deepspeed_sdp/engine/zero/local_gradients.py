"""The gradients of this rank's own batches, before they are averaged."""

from collections.abc import Mapping

import torch
from torch import nn


class LocalGradients:
    """Sums the micro-batches of a step in ``dtype``; autograd would sum them in the dtype of the weights.

    Args:
        parameters: by their index in the buckets.
        dtype: in which micro-batches are summed.
    """

    def __init__(self, parameters: Mapping[int, nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = parameters
        self.dtype = dtype
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, index: int) -> None:
        """``grad`` of a parameter holds a micro-batch's gradient: add it to those before."""
        parameter = self.parameters[index]
        if self.dtype == parameter.dtype or parameter.grad is None:
            return  # autograd adds up in ``grad`` itself
        before = self._sums.get(index)
        gradient = parameter.grad.to(self.dtype)
        self._sums[index] = gradient if before is None else before.add_(gradient)
        parameter.grad = None

    def take(self, index: int, stop: int) -> torch.Tensor | None:
        """The sum so far, of which elements before ``stop`` are taken; this object forgets it with the last one."""
        parameter = self.parameters[index]
        gradient = self._sums.get(index, parameter.grad)
        if stop == parameter.numel():
            self._sums.pop(index, None)
            parameter.grad = None
        return gradient

    def clear(self) -> None:
        """Forget every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._sums.clear()

    def tensors(self) -> list[torch.Tensor]:
        """Sums that are held beside ``grad``."""
        return list(self._sums.values())
