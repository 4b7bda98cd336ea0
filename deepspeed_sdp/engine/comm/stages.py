"""Collectives of which each takes the result of the one before."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from deepspeed_sdp.engine.comm.timing import TimedWork


class Arriving(NamedTuple):
    """The end of a flow.

    Attributes:
        works: collectives under way.
        take: gives what they bring, when they are done.
        nbytes: bytes of the buffers that live until then.
    """

    works: Sequence[TimedWork]
    take: Callable[[], list[torch.Tensor]]
    nbytes: int = 0


Flow = Generator[TimedWork | None, None, Arriving]
"""Yields a collective, and goes on with its result; ``None`` is one that has come."""


class Pending:
    """Flows side by side: the first collective of each, then the second of each, and so on.

    Args:
        flows: the first collective of each is issued at once.
        aside: where the host is while what follows another collective is issued.
        nbytes: bytes of the buffers that live until all collectives are issued.
        held: what must live until the result is taken.
    """

    def __init__(
        self,
        flows: Sequence[Flow],
        aside: Callable[[], Any],
        nbytes: int = 0,
        held: Sequence[torch.Tensor] = (),
    ) -> None:
        self._left = dict(enumerate(flows))
        self._arriving: dict[int, Arriving] = {}
        self._works: list[TimedWork] = []
        self._aside = aside
        self._nbytes = nbytes
        self._held = held
        self._advance()

    def _advance(self) -> None:
        """Wait for the collectives under way, and issue those that follow."""
        with self._aside() as is_aside:
            for work in self._works:
                work.wait(is_aside)
            self._works = []
            for place, flow in tuple(self._left.items()):
                try:
                    self._works += filter(None, [next(flow)])
                except StopIteration as end:
                    self._arriving[place] = end.value
                    del self._left[place]

    def issue_all(self) -> "Pending":
        """Issue every collective, whatever has to be waited for."""
        while self._left:
            self._advance()
        return self

    def arrives_within(self, seconds: float) -> bool:
        """Block for about so long at most; whether :meth:`finish` will then not keep the host waiting."""
        while self._left:
            if not all(work.arrives_within(seconds) for work in self._works):
                return False
            self._advance()
        return all(work.arrives_within(seconds) for end in self._arriving.values() for work in end.works)

    def finish(self) -> list[torch.Tensor]:
        """What the flows bring, in their order; blocks until the collectives are done. Call it once."""
        self.issue_all()
        ends = [self._arriving[place] for place in sorted(self._arriving)]
        for end in ends:
            for work in end.works:
                work.wait()
        return [value for end in ends for value in end.take()]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that live until the result is taken."""
        return self._nbytes if self._left else sum(end.nbytes for end in self._arriving.values())


class Stages:
    """Starts flows. Ranks that start the same ones in the same order issue the same collectives in the same order.

    Where a collective is waited for before the next one, an accelerator has a stream of its own wait, so that all are
    issued at once and neither the host nor what computes stands still. On a CPU the host has to wait: at once, or where
    the result is asked for.

    Args:
        device: of what is sent.
        replicas: with one alone no flow has a second collective.
    """

    def __init__(self, device: torch.device, replicas: int) -> None:
        has_streams = device.type not in ("cpu", "meta")
        self._module: Any = torch.get_device_module(device) if has_streams and replicas > 1 else None
        self._stream: Any = self._module.Stream(device) if self._module is not None else None

    @contextmanager
    def _aside(self) -> Iterator[bool]:
        if self._stream is None:
            yield False
            return
        # Memory that flows took there before, and that is free by now, may still be read by what computes.
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            yield True

    def start(
        self, flows: Sequence[Flow], *, can_wait: bool = False, nbytes: int = 0, held: Sequence[torch.Tensor] = ()
    ) -> Pending:
        """Issue ``flows``.

        Args:
            can_wait: the host need not wait before the result is asked for.
            nbytes: see :class:`Pending`.
            held: what the flows were given to use up.
        """
        pending = Pending(flows, self._aside, nbytes, held if self._stream is not None else ())
        return pending if can_wait and self._stream is None else pending.issue_all()
