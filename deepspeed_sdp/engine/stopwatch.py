"""Host time of the phases of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds by phase, over the micro-batches of a step. An accelerator's work counts where the host waits for it."""

    current: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    last_step: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.current[name] += time.perf_counter() - began

    def end_step(self) -> None:
        """Close the step: what was counted becomes :attr:`last_step`."""
        self.last_step = dict(self.current)
        self.current = defaultdict(float)
