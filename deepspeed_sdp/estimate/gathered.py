"""ZeRO-3 in bytes: which parts of the model are gathered when, as ``engine/zero/weights.py`` does it."""

from collections.abc import Callable

from deepspeed_sdp.estimate.buckets import Layout
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.ledger import Ledger
from deepspeed_sdp.estimate.trace import Moment


class GatheredParts:
    """Follows the sequence of gathers.

    Args:
        is_tied: whether the first part is needed after the layers too.
        before_backward: launches the reductions of the rounds before the one it is given.
    """

    def __init__(
        self, job: Job, layout: Layout, ledger: Ledger, is_tied: bool, before_backward: Callable[[int], None]
    ) -> None:
        self._ledger = ledger
        self._prefetch = int(job.prefetch)
        self._is_tied = is_tied
        self._before_backward = before_backward
        self._layout = layout
        self._last = len(layout.first_round) - 1
        width = job.dtype.itemsize
        parts: list[list[tuple[int, int]]] = [[] for _ in layout.first_round]
        for bucket in layout.buckets:
            parts[bucket.weights[0].part].append((bucket.padded * width, bucket.brought * width))
        is_all_to_all = job.transport("weights") == "all_to_all"
        self._flat = [sum(flat for flat, _ in part) for part in parts]
        self._pending_bytes = [sum(brought for _, brought in part) * is_all_to_all for part in parts]
        self._resident: set[int] = set()
        self._pending: set[int] = set()
        self._sequence: list[int] = []
        self._issued = 0
        self._to_visit: list[int] = []
        self._phase = "idle"

    def at(self, moment: Moment) -> None:
        """Do what the hooks do at ``moment``."""
        part = moment.part
        if moment.kind == "forward":
            if part == 0:
                self._sequence, self._issued, self._phase = list(range(self._last + 1)), 0, "forward"
            elif part - 1 < self._last - 1 and not self._stays(part - 1):
                self._free(part - 1)
            self._need(part)
        elif moment.kind == "loss":
            self._issue_up_to(len(self._sequence))
            for index in range(self._last + 1):
                self._settle(index)
                if not (self._stays(index) or index >= self._last - 1):
                    self._free(index)
        elif moment.kind == "backward" and (part > 0 or self._is_tied):
            self._begin_backward()
            self._visit(part)
        elif moment.kind == "end":
            self._begin_backward()
            self._visit_down_to(0)
            self._issue_up_to(len(self._sequence))

    def end(self) -> None:
        """Nothing stays."""
        for part in range(self._last + 1):
            self._settle(part)
            self._free(part)
        self._phase = "idle"

    @property
    def pending_bytes(self) -> int:
        """Of the buffers in which weights are under way."""
        return sum(self._pending_bytes[part] for part in self._pending)

    def _stays(self, part: int) -> bool:
        return part == 0 and self._is_tied

    def _begin_backward(self) -> None:
        if self._phase == "backward":
            return
        needed = range(self._last, -1 if self._is_tied else 0, -1)
        self._sequence = [part for part in needed if part not in self._resident]
        self._issued, self._phase = 0, "backward"
        self._to_visit = list(range(1, self._last + 1))

    def _visit_down_to(self, part: int) -> None:
        """What a worker lacks has no hooks: the next part that it has catches up with it."""
        while self._to_visit and self._to_visit[-1] >= part:
            visited = self._to_visit.pop()
            place = self._sequence.index(visited) if visited in self._sequence else -1
            self._issue_up_to(place + 1 + self._prefetch)
            self._before_backward(self._layout.first_round[visited])

    def _visit(self, part: int) -> None:
        self._visit_down_to(part)
        self._need(part)
        for later in range(part + 1, self._last + 1):
            if later in self._resident and later not in self._pending and not self._stays(later):
                self._free(later)

    def _need(self, part: int) -> None:
        place = self._sequence.index(part) if part in self._sequence else -1
        if self._phase == "forward":
            self._issue_up_to(place + 1 + self._prefetch)
        for earlier in self._sequence[: max(place, 0)]:
            self._settle(earlier)
        self._settle(part)

    def _issue_up_to(self, count: int) -> None:
        while self._issued < min(count, len(self._sequence)):
            part = self._sequence[self._issued]
            self._issued += 1
            self._resident.add(part)
            self._pending.add(part)
            self._ledger.add("weights", self._flat[part])
            self._ledger.add("buffers", self._pending_bytes[part])

    def _settle(self, part: int) -> None:
        if part in self._pending:
            self._pending.discard(part)
            self._ledger.add("buffers", -self._pending_bytes[part])

    def _free(self, part: int) -> None:
        if part in self._resident:
            self._resident.discard(part)
            self._ledger.add("weights", -self._flat[part])
