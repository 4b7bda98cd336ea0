"""Collectives of which each takes the result of the one before."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from deepspeed_sdp.engine.comm.timing import TimedWork

T = TypeVar("T")
Flow = Generator[TimedWork, None, T]
"""Yields a collective, and goes on with its result; returns what is still under way, and how its result is had."""


class Stages:
    """Runs flows side by side: the first collective of each, then the second of each, and so on.

    Everything is issued when :meth:`run` returns, in an order that depends on the flows alone: ranks that run the same
    flows in the same order issue the same collectives in the same order. Where one is waited for, on a CPU the host
    waits. On an accelerator a stream of its own does, so that neither the host nor what computes stands still.

    Args:
        device: of what is sent.
        replicas: with one alone no flow has a second collective.

    Attributes:
        is_aside: whether that stream uses the tensors that a flow is given when :meth:`run` is over: whoever gives them
            holds them until the result is taken.
    """

    def __init__(self, device: torch.device, replicas: int) -> None:
        self.is_aside = device.type != "cpu" and replicas > 1
        self._module: Any = torch.get_device_module(device) if self.is_aside else None
        self._stream: Any = self._module.Stream(device) if self._module is not None else None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # Memory that flows took there before, and that is free by now, may still be read by what computes.
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            yield

    def run(self, flows: Sequence[Flow[T]]) -> list[T]:
        """What each flow returns, in their order."""
        results: dict[int, T] = {}
        left = dict(enumerate(flows))
        with self._aside():
            while left:
                works = []
                for place, flow in tuple(left.items()):
                    try:
                        works.append(next(flow))
                    except StopIteration as end:
                        results[place] = end.value
                        del left[place]
                for work in works:
                    work.wait()
        return [results[place] for place in range(len(flows))]
