"""ZeRO-3 in bytes: what the engine's schedule gathers and frees takes."""

from collections.abc import Callable

from deepspeed_sdp.engine.zero.rounds import schedule_of
from deepspeed_sdp.estimate.buckets import Layout
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.ledger import Ledger
from deepspeed_sdp.estimate.trace import Moment
from deepspeed_sdp.estimate.wire import Wire
from deepspeed_sdp.plan.schedule import Action, Steps


class GatheredParts:
    """Follows the sequence of gathers.

    Args:
        before_backward: launches the reductions of the rounds before the one it is given.

    Attributes:
        pending_bytes: of the buffers in which weights are under way.
        sent: bytes that this rank has sent.
    """

    def __init__(
        self, job: Job, layout: Layout, ledger: Ledger, wire: Wire, before_backward: Callable[[int], None]
    ) -> None:
        self._ledger = ledger
        self._uses = layout.uses
        self._before_backward = before_backward
        self._rounds = layout.parts
        self._schedule = schedule_of(layout.uses, job.prefetch)
        of_parts = [[b for round_ in rounds for b in layout.rounds[round_]] for rounds in layout.parts]
        self._flat = [sum(bucket.padded_numel for bucket in part) * job.dtype.itemsize for part in of_parts]
        self._moved = [wire.gather(part) for part in of_parts]
        self.pending_bytes = self.sent = 0

    def at(self, moment: Moment) -> None:
        """Do what the hooks do at ``moment``."""
        schedule, part = self._schedule, moment.part
        if moment.kind == "forward":
            self._run(schedule.after_forward(part - 1) if part else schedule.begin_forward())
            self._run(schedule.before_forward(part))
        elif moment.kind == "loss":
            self._run(schedule.end_forward(is_training=True))
        elif moment.kind == "backward" and self._uses[part].is_needed_backward:
            self._run(schedule.before_backward(part))
        elif moment.kind == "end":
            self._run(schedule.complete_backward())

    def end(self) -> None:
        """Nothing stays."""
        self._run(self._schedule.end_backward())

    def _run(self, steps: Steps) -> None:
        for action, part in steps:
            if action is Action.REDUCE:
                self._before_backward(self._rounds[part].start)
            elif action is Action.RESHARD:
                self._ledger.add("weights", -self._flat[part])
            else:
                buffers = self._moved[part].buffers
                if action is Action.UNSHARD:
                    self._ledger.add("weights", self._flat[part])
                    self.sent += self._moved[part].sent
                else:
                    buffers = -buffers
                self.pending_bytes += buffers
                self._ledger.add("buffers", buffers)
