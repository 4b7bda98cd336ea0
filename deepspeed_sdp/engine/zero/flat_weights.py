"""Weights that lie in one flat tensor, whose memory can be given back and taken again."""

from collections.abc import Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.zero.freed_weight import give_values, nothing_of, take_values


class FlatWeights:
    """Parameters as views of one flat tensor, like FSDP's flat parameters (``torch.distributed.fsdp``).

    Args:
        parameters: their data moves into the flat tensor, one after the other.
        numel: of the flat tensor; what the parameters do not fill is zero.

    Attributes:
        flat: ``[numel]``, weights in the dtype they are trained in.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], numel: int) -> None:
        first = parameters[0]
        self.flat = self._kept = torch.zeros(numel, dtype=first.dtype, device=first.device)
        self._parameters = tuple(parameters)
        self._nothing: tuple[torch.Tensor, ...] = ()
        for parameter, view in zip(parameters, self._views(), strict=True):
            view.copy_(parameter.data)
            parameter.data = view

    def _views(self) -> list[torch.Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        views = torch.split(self.flat.narrow(0, 0, sum(sizes)), sizes)
        return [view.view(parameter.shape) for parameter, view in zip(self._parameters, views, strict=True)]

    def free(self) -> None:
        """Give the flat tensor's memory back. Parameters stay the objects that they are, without values."""
        self._nothing = self._nothing or tuple(map(nothing_of, self._parameters))
        for parameter, nothing in zip(self._parameters, self._nothing, strict=True):
            take_values(parameter, nothing)
        self.flat = self._kept
        self.flat.untyped_storage().resize_(0)

    def allocate(self, is_kept: bool = True) -> None:
        """Give the flat tensor memory, for the transport to fill; parameters have values again after :meth:`show`.

        Args:
            is_kept: fill what autograd saved of the weights before; else take new memory, which is never taken away
                from who holds a view of it.
        """
        if is_kept:
            self.flat = self._kept
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        else:
            self.flat = torch.empty_like(self._kept)

    def show(self) -> None:
        """The flat tensor is filled: let the parameters have their values."""
        for parameter, view in zip(self._parameters, self._views(), strict=True):
            give_values(parameter, view)
