"""Time of the phases of a step and of its communication, and their names in a profiler's trace."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch.profiler import record_function

from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.waits import raise_if_lost

# Seconds between two looks at a collective that is waited for a limited time.
_POLL = 2e-4


@contextmanager
def named(what: str) -> Iterator[None]:
    """What runs inside, and on a device what is launched there, bears this name in a profiler's trace."""
    with record_function(f"deepspeed_sdp::{what}"):
        yield


# Events that a step may leave unread. Only what is no step, a long evaluation say, makes more.
_MOST_UNREAD = 10_000


class _HostEvent:
    """What a device's event is where the host computes itself."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_HostEvent") -> float:
        return 1e3 * (end._at - self._at)


@dataclass
class _Step:
    """Seconds by phase, and what was not read yet: phase, the events of its beginning and end."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    unread: list[tuple[str, Any, Any]] = field(default_factory=list)

    def read(self, count: int) -> None:
        for name, began, ended in self.unread[:count]:
            ended.synchronize()
            self.seconds[name] += began.elapsed_time(ended) / 1e3
        del self.unread[:count]


class Stopwatch:
    """Seconds by phase, over the micro-batches of a step.

    ``communication`` counts each collective from its issue until who waits for it goes on, ``exposed`` the part of it
    in which nothing else could run; the difference is time in which it could run beside computation. On an accelerator
    times are the device's: they come from events on its stream, which are read when the next step is over. So nothing
    waits for the device, and no work's future is touched: a callback there would keep what the work wrote alive.

    Attributes:
        last_step: phases of the last step, on an accelerator of the one before it; empty until there is one.
        checkpoint_stall: how long the last call of ``save_checkpoint`` kept training waiting, on the host's clock.
    """

    def __init__(self) -> None:
        device_event = get_accelerator().Event
        self._is_host = device_event is None
        self._event: Any = _HostEvent if self._is_host else partial(device_event, enable_timing=True)
        self._step, self._step_before = _Step(), _Step()
        self.last_step: dict[str, float] = {}
        self.checkpoint_stall = 0.0

    def now(self) -> Any:
        """An event at this place of the device's stream."""
        event = self._event()
        event.record()
        return event

    def count(self, name: str, began: Any, ended: Any) -> None:
        """What happened between two events belongs to ``name``."""
        unread = self._step.unread
        unread.append((name, began, ended))
        if self._is_host or len(unread) > _MOST_UNREAD:
            self._step.read(max(1, len(unread) // 2))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        began = self.now()
        try:
            with named(name):
                yield
        finally:
            self.count(name, began, self.now())

    def timed(self, work: Any, what: str, group: Group) -> "TimedWork":
        """``work`` (a ``dist.Work``) of ``group``, counted from now until who waits goes on; ``what`` it does."""
        return TimedWork(work, self, what, group)

    def end_step(self) -> None:
        """Close the step: what was counted becomes :attr:`last_step`, on an accelerator one step later."""
        over, self._step = self._step, _Step()
        if not self._is_host:
            over, self._step_before = self._step_before, over
        over.read(len(over.unread))
        self.last_step = dict(over.seconds)

    @property
    def last_step_seconds(self) -> dict[str, float]:
        """The last step's phases, and its communication: in all, exposed and overlapped."""
        waited, total = self.last_step.get("exposed", 0.0), self.last_step.get("communication", 0.0)
        return {**self.last_step, "communication": total, "exposed": waited, "overlapped": total - waited}


class TimedWork:
    """A ``dist.Work`` that tells a stopwatch how long it was under way, and how long it was waited for."""

    def __init__(self, work: Any, stopwatch: Stopwatch, what: str, group: Group) -> None:
        self._work = work
        self._what, self._group = what, group
        self._stopwatch = stopwatch
        self._issued = stopwatch.now()

    def arrives_within(self, seconds: float) -> bool:
        """Block for so long at most; whether :meth:`wait` will then not keep the host waiting."""
        if self._group.backend != "gloo":
            return True  # its stream waits
        began, deadline = self._stopwatch.now(), time.perf_counter() + seconds
        while not (is_done := bool(self._work.is_completed())) and time.perf_counter() < deadline:
            time.sleep(_POLL)
        self._stopwatch.count("exposed", began, self._stopwatch.now())
        return is_done

    def wait(self, is_aside: bool = False) -> None:
        """Block until the collective is done (on an accelerator: until its stream waits for it).

        Args:
            is_aside: on a stream on which nothing computes: the wait is not exposed.

        Raises:
            WaitError: ranks of the group did not come.
        """
        began = self._stopwatch.now()
        try:
            with named(f"wait: {self._what}"):
                self._work.wait()
        except RuntimeError as error:
            raise_if_lost(error, self._what, self._group.ranks)
            raise
        ended = self._stopwatch.now()
        if not is_aside:
            self._stopwatch.count("exposed", began, ended)
        self._stopwatch.count("communication", self._issued, ended)
