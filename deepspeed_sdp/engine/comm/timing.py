"""Host time of the phases of a step, and of its communication."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.waits import raise_if_lost

# Seconds between two looks at a collective that is waited for a limited time.
_POLL = 2e-4


@dataclass
class Stopwatch:
    """Seconds by phase, over the micro-batches of a step. An accelerator's work counts where the host waits for it.

    ``communication`` counts from the issue of each collective to its completion, ``exposed`` the part of it that the
    host spent waiting; the difference ran beside computation or beside other collectives. ``checkpoint_stall``: how
    long the last call of ``save_checkpoint`` kept training waiting.
    """

    current: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    last_step: dict[str, float] = field(default_factory=dict)
    checkpoint_stall: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.current[name] += time.perf_counter() - began

    def timed(self, work: Any, what: str, group: Group) -> "TimedWork":
        """``work`` (a ``dist.Work``) of ``group``, counted from now until it completes; ``what`` it does, in words."""
        return TimedWork(work, self, what, group)

    def end_step(self) -> None:
        """Close the step: what was counted becomes :attr:`last_step`."""
        self.last_step = dict(self.current)
        self.current = defaultdict(float)

    @property
    def last_step_seconds(self) -> dict[str, float]:
        """The last step's phases, and its communication: in all, exposed and overlapped."""
        waited, total = self.last_step.get("exposed", 0.0), self.last_step.get("communication", 0.0)
        # The callback that tells of completion can run late: waiting is a lower bound.
        total = max(waited, total)
        return {**self.last_step, "communication": total, "exposed": waited, "overlapped": total - waited}


class TimedWork:
    """A ``dist.Work`` that tells a stopwatch when it completed and how long the host waited for it."""

    def __init__(self, work: Any, stopwatch: Stopwatch, what: str, group: Group) -> None:
        self._work = work
        self._what, self._group = what, group
        self._stopwatch = stopwatch
        self._issued = time.perf_counter()
        self._completed: float | None = None
        work.get_future().add_done_callback(self._done)

    def _done(self, _: Any) -> None:
        self._completed = time.perf_counter()

    def arrives_within(self, seconds: float) -> bool:
        """Block for so long at most; whether :meth:`wait` will then not keep the host waiting."""
        if self._group.backend != "gloo":
            return True  # its stream waits
        began = time.perf_counter()
        while not (is_done := bool(self._work.is_completed())) and time.perf_counter() - began < seconds:
            time.sleep(_POLL)
        self._stopwatch.current["exposed"] += time.perf_counter() - began
        return is_done

    def wait(self) -> None:
        """Block until the collective is done (on an accelerator: until its stream waits for it).

        Raises:
            WaitError: ranks of the group did not come.
        """
        began = time.perf_counter()
        try:
            self._work.wait()
        except RuntimeError as error:
            raise_if_lost(error, self._what, self._group.ranks)
            raise
        now = time.perf_counter()
        self._stopwatch.current["exposed"] += now - began
        # The callback runs on another thread, perhaps later than the waiter.
        self._stopwatch.current["communication"] += (self._completed or now) - self._issued
