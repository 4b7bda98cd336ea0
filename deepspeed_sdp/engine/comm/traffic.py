"""Bytes that this rank sends, counted where a collective is issued."""

from collections import Counter, deque
from dataclasses import dataclass, field

SHARED_SET = 0


def all_reduce_bytes(nbytes: int, ranks: int) -> int:
    """Bytes one rank sends in a ring all-reduce of ``nbytes``: ``2 (n-1)/n``."""
    return 2 * nbytes * (ranks - 1) // ranks


def all_gather_bytes(nbytes: int, ranks: int) -> int:
    """Bytes one rank sends in a ring all-gather (or reduce-scatter) of ``nbytes`` in all: ``(n-1)/n``."""
    return nbytes * (ranks - 1) // ranks


@dataclass
class Traffic:
    """Bytes sent by this rank, by kind of collective and owner set; ``current`` is the step in progress.

    Attributes:
        recent: bytes of the last steps, as many as there are in a round of local steps.
    """

    current: Counter[tuple[str, int]] = field(default_factory=Counter)
    last: Counter[tuple[str, int]] = field(default_factory=Counter)
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=1))

    def add(self, kind: str, nbytes: int, owner_set: int = SHARED_SET) -> None:
        """Count ``nbytes`` sent by a collective of ``kind`` for what ``owner_set`` owns."""
        self.current[kind, owner_set] += nbytes

    def end_step(self) -> None:
        """Close the step: what was counted becomes the last step."""
        self.last, self.current = self.current, Counter()
        self.recent.append(self.last_step_bytes)

    def extend_step(self) -> None:
        """What was counted since the last step was closed belongs to it."""
        self.last, self.current = self.last + self.current, Counter()
        self.recent[-1] = self.last_step_bytes

    @property
    def last_step(self) -> dict[str, int]:
        """Bytes of the last step by kind of collective."""
        return _sums(self.last, 0)

    @property
    def last_step_by_owner_set(self) -> dict[int, int]:
        """Bytes of the last step by owner set."""
        return _sums(self.last, 1)

    @property
    def mean_step_bytes(self) -> int:
        """Bytes sent in a step, on average over a round."""
        return round(sum(self.recent) / max(1, len(self.recent)))

    @property
    def last_step_bytes(self) -> int:
        """All bytes sent in the last step."""
        return sum(self.last.values())


def _sums(counts: Counter[tuple[str, int]], part: int) -> dict:  # type: ignore[type-arg]
    sums: Counter[object] = Counter()
    for key, nbytes in counts.items():
        sums[key[part]] += nbytes
    return dict(sums)
