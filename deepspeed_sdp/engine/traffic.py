"""Bytes that this rank sends, counted where a collective is issued."""

from collections import Counter
from dataclasses import dataclass, field


def all_reduce_bytes(nbytes: int, ranks: int) -> int:
    """Bytes one rank sends in a ring all-reduce of ``nbytes``: ``2 (n-1)/n``."""
    return 2 * nbytes * (ranks - 1) // ranks


def all_gather_bytes(nbytes: int, ranks: int) -> int:
    """Bytes one rank sends in a ring all-gather whose result has ``nbytes``: ``(n-1)/n``."""
    return nbytes * (ranks - 1) // ranks


@dataclass
class Traffic:
    """Bytes sent by this rank, by kind of collective; ``current`` is the step in progress."""

    current: Counter[str] = field(default_factory=Counter)
    last_step: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, nbytes: int) -> None:
        """Count ``nbytes`` sent by a collective of ``kind``."""
        self.current[kind] += nbytes

    def end_step(self) -> None:
        """Close the step: what was counted becomes :attr:`last_step`."""
        self.last_step = dict(self.current)
        self.current = Counter()

    @property
    def last_step_bytes(self) -> int:
        """All bytes sent in the last step."""
        return sum(self.last_step.values())
