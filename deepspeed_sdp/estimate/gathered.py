"""ZeRO-3 in bytes: what the engine's schedule gathers and frees takes."""

from collections.abc import Callable

from deepspeed_sdp.estimate.buckets import Layout
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.ledger import Ledger
from deepspeed_sdp.estimate.trace import Moment
from deepspeed_sdp.plan.schedule import Action, Schedule, Steps


class GatheredParts:
    """Follows the sequence of gathers.

    Args:
        is_tied: whether the first part is needed after the layers too.
        before_backward: launches the reductions of the rounds before the one it is given.

    Attributes:
        pending_bytes: of the buffers in which weights are under way.
    """

    def __init__(
        self, job: Job, layout: Layout, ledger: Ledger, is_tied: bool, before_backward: Callable[[int], None]
    ) -> None:
        self._ledger = ledger
        self._is_tied = is_tied
        self._before_backward = before_backward
        self._first_round = layout.first_round
        count, width = len(layout.first_round), job.dtype.itemsize
        self._schedule = Schedule(count, int(job.prefetch), range(not is_tied, count), range(is_tied))
        flat, brought = [0] * count, [0] * count
        for bucket in layout.buckets:
            part = bucket.weights[0].part
            flat[part] += bucket.padded * width
            brought[part] += bucket.brought * width
        is_all_to_all = job.transport("weights") == "all_to_all"
        self._flat = flat
        self._buffers = [nbytes * is_all_to_all for nbytes in brought]
        self.pending_bytes = 0

    def at(self, moment: Moment) -> None:
        """Do what the hooks do at ``moment``."""
        schedule, part = self._schedule, moment.part
        if moment.kind == "forward":
            self._run(schedule.after_forward(part - 1) if part else schedule.begin_forward())
            self._run(schedule.before_forward(part))
        elif moment.kind == "loss":
            self._run(schedule.end_forward(is_training=True))
        elif moment.kind == "backward" and (part > 0 or self._is_tied):
            self._run(schedule.before_backward(part))
        elif moment.kind == "end":
            self._run(schedule.complete_backward())

    def end(self) -> None:
        """Nothing stays."""
        self._run(self._schedule.end_backward())

    def _run(self, steps: Steps) -> None:
        for action, part in steps:
            if action is Action.REDUCE:
                self._before_backward(self._first_round[part])
            elif action is Action.RESHARD:
                self._ledger.add("weights", -self._flat[part])
            else:
                buffers = self._buffers[part]
                if action is Action.UNSHARD:
                    self._ledger.add("weights", self._flat[part])
                else:
                    buffers = -buffers
                self.pending_bytes += buffers
                self._ledger.add("buffers", buffers)
