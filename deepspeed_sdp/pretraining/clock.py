"""Time of training steps, apart from all else that a loop does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from deepspeed.accelerator import get_accelerator


class Lap(NamedTuple):
    """Steps that were counted since the last one, and what they took."""

    steps: int
    seconds: float


class TrainingClock:
    """Runs from its making on, except for what is done aside. An accelerator's work counts where it was asked for."""

    def __init__(self) -> None:
        self._began, self._aside, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The time inside does not count."""
        get_accelerator().synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            get_accelerator().synchronize()
            self._aside += time.perf_counter() - began

    def count(self) -> None:
        """One step was done, and not aside."""
        self._steps += 1

    def lap(self) -> Lap:
        """What was counted since the last call; waits for the accelerator."""
        get_accelerator().synchronize()
        now = time.perf_counter()
        lap = Lap(self._steps, now - self._began - self._aside)
        self._began, self._aside, self._steps = now, 0.0, 0
        return lap
