"""Tensors on their way to a file: as bytes on the CPU, through two pinned buffers where they lie on an accelerator."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

_BUFFER_BYTES = 32 << 20


def staged(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[memoryview]:
    """The bytes of ``tensors``, one after the other; each piece is good until the next one is asked for.

    Args:
        device: where tensors may lie. On an accelerator one buffer is filled while the other one is read, and no other
            memory is taken on the CPU.
    """
    if device.type == "cpu":
        yield from (_bytes(tensor) for tensor in tensors if tensor.numel())
        return
    accelerator = get_accelerator()
    buffers = [accelerator.pin_memory(torch.empty(_BUFFER_BYTES, dtype=torch.uint8)) for _ in range(2)]
    filled: tuple[Any, memoryview] | None = None
    for number, (event, length) in enumerate(_fill(buffers, tensors, accelerator)):
        if filled is not None:
            filled[0].synchronize()
            yield filled[1]
        filled = event, _bytes(buffers[number % 2][:length])
    if filled is not None:
        filled[0].synchronize()
        yield filled[1]


def _fill(buffers: list[torch.Tensor], tensors: Iterable[torch.Tensor], accelerator: Any) -> Iterator[tuple[Any, int]]:
    """Fill the buffers in turns: an event at which one is full, and the bytes in it."""
    number = used = 0
    for tensor in tensors:
        rest = tensor.detach().contiguous().view(-1).view(torch.uint8)
        while len(rest):
            piece = rest[: _BUFFER_BYTES - used]
            buffers[number % 2][used : used + len(piece)].copy_(piece, non_blocking=True)
            used, rest = used + len(piece), rest[len(piece) :]
            if used == _BUFFER_BYTES:
                yield _recorded(accelerator), used
                number, used = number + 1, 0
    if used:
        yield _recorded(accelerator), used


def _recorded(accelerator: Any) -> Any:
    event = accelerator.Event()
    event.record()
    return event


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
