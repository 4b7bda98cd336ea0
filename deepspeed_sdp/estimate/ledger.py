"""Bytes by kind through a step, and how they stood at the peak."""

from collections import Counter
from dataclasses import dataclass, field

KINDS = ("weights", "optimizer", "gradients", "activations", "buffers")


@dataclass
class Ledger:
    """What lives on a GPU while a step is replayed.

    Kinds: ``weights`` (with gathered ones at ZeRO-3), ``optimizer`` (master weights and moments), ``gradients`` (those
    of parameters, sums, averages, and fp32 copies at the update), ``activations`` (what the passes keep, and their
    temporary tensors), ``buffers`` (gradients and weights on their way, and temporary tensors of the update).

    Attributes:
        now: bytes by kind.
        at_peak: the same when their sum was largest.
        largest: the most of each kind, whenever.
        phase_of_peak: ``"forward"``, ``"backward"`` or ``"step"``.
        largest_gradients: the most that gradients and what they travel in took, seen at every gradient and update.
    """

    now: Counter[str] = field(default_factory=Counter)
    at_peak: dict[str, int] = field(default_factory=dict)
    largest: Counter[str] = field(default_factory=Counter)
    phase: str = "forward"
    phase_of_peak: str = "forward"
    peak: int = 0
    largest_gradients: int = 0
    _total: int = 0

    def add(self, kind: str, nbytes: int) -> None:
        """They live from now on, or with a negative number no more."""
        self.now[kind] += nbytes
        self._total += nbytes
        if nbytes > 0:
            self._see(kind, 0)

    def pass_by(self, kind: str, nbytes: int) -> None:
        """They live for a moment."""
        self._see(kind, max(nbytes, 0))

    def sample_gradients(self, at_hand: int = 0) -> None:
        """Remember what gradients take now, with so many bytes of one that is not counted yet."""
        self.largest_gradients = max(self.largest_gradients, self.now["gradients"] + self.now["buffers"] + at_hand)

    def set(self, kind: str, nbytes: int) -> None:
        """So many live now."""
        self.add(kind, nbytes - self.now[kind])

    def _see(self, kind: str, more: int) -> None:
        """What lives now, and so many bytes more of ``kind``."""
        self.largest[kind] = max(self.largest[kind], self.now[kind] + more)
        if self._total + more > self.peak:
            self.peak, self.phase_of_peak = self._total + more, self.phase
            self.at_peak = {name: self.now[name] + more * (name == kind) for name in KINDS}
