"""Copies between the accelerator and the memory of the host, where offloaded state rests.

All are asynchronous, on the stream that computes, out of and into buffers of the host. Two buffers each way take turns:
while one portion is stepped, the gradients of the next one come and the weights of the one before go.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

_IN_FLIGHT = 2


class HostCopies:
    """See the module.

    Args:
        numel: elements of the largest portion's shards.
        dtype: of the weights.
        is_pinned: whether the buffers are page-locked (DeepSpeed's ``pin_memory``); without it copies block the host.
        sends: whether the weights are the accelerator's, or rest on the host too.
    """

    def __init__(self, numel: int, dtype: torch.dtype, is_pinned: bool, sends: bool) -> None:
        coming, going = buffer_numels(numel, sends)
        self._gradients = deque(_Buffer(size, torch.float32, is_pinned) for size in coming)
        self._weights = deque(_Buffer(size, dtype, is_pinned) for size in going)
        self.sends = sends

    def fetched(self, portions: Iterable[Sequence[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
        """The fp32 tensors of each portion in the host's memory, valid until the next one is asked for."""
        coming: deque[_Buffer] = deque()
        for tensors in portions:
            self._gradients.rotate()
            coming.append(self._gradients[0])
            coming[-1].take(tensors, non_blocking=True)
            if len(coming) == _IN_FLIGHT:
                yield coming.popleft().settled()
        yield from (buffer.settled() for buffer in coming)

    def send(self, weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Start to copy ``values``, which are the host's, to ``weights``; ``values`` are free to change at once."""
        self._weights.rotate()
        buffer = self._weights[0]
        buffer.take(values)
        if values:
            torch._foreach_copy_(list(weights), buffer.held, non_blocking=True)
            buffer.mark()


def buffer_numels(numel: int, sends: bool) -> tuple[list[int], list[int]]:
    """Elements of the buffers of fp32 gradients, and of weights; see :class:`HostCopies`."""
    return [numel] * _IN_FLIGHT, [numel * sends] * _IN_FLIGHT


class _Buffer:
    """Memory of the host that copies may be under way to or from.

    Attributes:
        held: what was put into it last.
    """

    def __init__(self, numel: int, dtype: torch.dtype, is_pinned: bool) -> None:
        memory = torch.empty(numel, dtype=dtype)
        self._memory = get_accelerator().pin_memory(memory) if is_pinned else memory
        self.held: list[torch.Tensor] = []
        self._event: Any = None

    def take(self, tensors: Sequence[torch.Tensor], non_blocking: bool = False) -> None:
        """Copy ``tensors`` into it, once nothing is under way any more."""
        self.settled()
        numels = [tensor.numel() for tensor in tensors]
        pieces = torch.split(self._memory[: sum(numels)], numels)
        self.held = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
        if tensors:
            torch._foreach_copy_(self.held, list(tensors), non_blocking=non_blocking)
        if non_blocking:
            self.mark()

    def mark(self) -> None:
        """Copies have been started."""
        event = get_accelerator().Event
        if event is not None:  # a CPU has none: it has copied
            self._event = event()
            self._event.record()

    def settled(self) -> list[torch.Tensor]:
        """What is held, once nothing is under way any more."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self.held
