"""A step of plain DeepSpeed (0.19) in bytes: what its engine and its ZeRO optimizers allocate, in their order.

``runtime/fp16/unfused_optimizer.py`` and ``fused_optimizer.py`` at stage 0, ``runtime/zero/stage_1_and_2.py``, and
``stage3.py`` with its defaults for what is kept gathered.
"""

from collections.abc import Sequence

import torch

from deepspeed_sdp.estimate.job import DEEPSPEED_BUCKET, Job
from deepspeed_sdp.estimate.ledger import Ledger
from deepspeed_sdp.estimate.trace import Moment
from deepspeed_sdp.estimate.worker_model import WorkerModel

# Stage 3: parameters up to so many elements stay gathered; so many may be gathered at a time, and ahead in one piece.
_PERSISTENT = 100_000
_MAX_LIVE = 1_000_000_000
_PREFETCH = 50_000_000
# Stage 0 reduces so many elements at once.
_ALL_REDUCE = 500_000_000


class DeepSpeedStep:
    """Replays one step of one rank that holds the full model."""

    def __init__(self, job: Job, model: WorkerModel) -> None:
        self._job = job
        self.ledger = Ledger()
        self._width = job.dtype.itemsize
        self._numels = {weight.local: weight.numel for weight in model.trained}
        self._numel = sum(self._numels.values())
        self._largest = max(self._numels.values())
        self._shard = -(-self._numel // job.world_size) if job.stage else self._numel
        self._bucket = (job.bucket or DEEPSPEED_BUCKET) * job.accumulate_dtype.itemsize if job.stage else 0
        self._persistent = sum(numel for numel in self._numels.values() if numel <= _PERSISTENT)
        self._held: set[str] = set()
        self._hold_state(model)

    def _hold_state(self, model: WorkerModel) -> None:
        job, width = self._job, self._width
        weights = self._numel * width
        if job.stage == 3:
            weights = self._persistent * width + (0 if job.offload_param else self._shard * width)
        self.ledger.add("weights", weights + model.held * width + model.buffer_bytes)
        is_own_master = job.dtype == torch.float32 and job.stage == 0
        optimizer = 4 * self._shard * (job.moments + (not is_own_master))
        self.ledger.add("optimizer", 0 if job.offload_optimizer else optimizer)
        if job.stage == 3:
            # What was gathered in one piece is held until the next such piece, as measured.
            self.ledger.add("buffers", min(self._numel - self._persistent, _PREFETCH) * width)
            # These are made once and stay.
            self.ledger.add("buffers", self._bucket)
            self.ledger.add("gradients", self._shard * job.accumulate_dtype.itemsize)

    def run(self, moments: Sequence[Moment]) -> Ledger:
        """All passes and the update."""
        for is_boundary in [False, True] if self._job.accumulation > 1 else [True]:
            self._run_passes(moments, is_boundary)
        self._step()
        return self.ledger

    def _run_passes(self, moments: Sequence[Moment], is_boundary: bool) -> None:
        ledger, stage = self.ledger, self._job.stage
        gathered = min(self._numel - self._persistent, _MAX_LIVE) * self._width if stage == 3 else 0
        if gathered:
            ledger.add("weights", gathered)
            # What is gathered in one piece is copied out of it.
            ledger.pass_by("buffers", min(self._numel - self._persistent, _PREFETCH) * self._width)
        in_bucket = 0
        is_filled = False
        for moment in moments:
            ledger.phase = "forward" if moment.kind in ("forward", "loss") else "backward"
            ledger.set("activations", moment.peak)
            ledger.set("activations", moment.live)
            if moment.kind != "gradient":
                continue
            numel = self._numels[moment.weight]
            ledger.sample_gradients(numel * self._width)
            if stage < 2:
                self._hold(moment.weight, numel)
                continue
            if stage == 2 and not is_filled:
                is_filled = True
                ledger.add("buffers", self._bucket * (1 + self._job.overlap_comm))
            if in_bucket and in_bucket + numel > (self._job.bucket or DEEPSPEED_BUCKET):
                self._flush(in_bucket)
                in_bucket = 0
            in_bucket += numel
        if stage >= 2:
            self._flush(in_bucket)
        elif is_boundary:
            self._reduce_all()
        if stage == 2:
            ledger.add("buffers", -self._bucket * (1 + self._job.overlap_comm))
        ledger.add("weights", -gathered)

    def _hold(self, name: str, numel: int) -> None:
        nbytes = numel * self._job.accumulate_dtype.itemsize
        if name not in self._held:
            self._held.add(name)
            self.ledger.add("gradients", nbytes)

    def _flush(self, numel: int) -> None:
        """Flattened once more to be sent; what is this rank's own is put aside."""
        width = self._job.reduce_dtype.itemsize
        self.ledger.pass_by("buffers", numel * width)
        if self._job.stage == 2:
            self.ledger.set("gradients", self._shard * self._job.accumulate_dtype.itemsize)

    def _reduce_all(self) -> None:
        ledger, job = self.ledger, self._job
        if job.stage == 0:
            ledger.pass_by("buffers", min(self._numel, _ALL_REDUCE) * job.reduce_dtype.itemsize)
            return
        # Gradients move into the bucket, and free their own memory; the first rank's own come first, all others are
        # there still when its part gets memory.
        ledger.pass_by("buffers", self._bucket * (1 + job.overlap_comm) + self._shard * job.accumulate_dtype.itemsize)
        ledger.set("gradients", self._shard * job.accumulate_dtype.itemsize)

    def _step(self) -> None:
        ledger, job = self.ledger, self._job
        ledger.phase = "step"
        average = job.accumulate_dtype.itemsize
        if job.offload_optimizer:
            ledger.set("gradients", 0)
            return
        if job.stage == 0:
            self._step_whole()
            return
        if average != 4 and job.stage < 3:
            # Flattened, then in fp32; only then the averages are gone.
            ledger.pass_by("gradients", self._shard * (average + 4))
            ledger.set("gradients", 4 * self._shard)
        else:
            ledger.add("gradients", 4 * self._shard)
        ledger.sample_gradients()
        ledger.pass_by("buffers", 4 * self._shard * job.step_temporaries)
        ledger.set("gradients", self._shard * average if job.stage == 3 else 0)

    def _step_whole(self) -> None:
        ledger, job = self.ledger, self._job
        if job.dtype != torch.float32:
            if job.step_temporaries == 0:
                # A fused optimizer takes one flat gradient, made of fp32 copies.
                ledger.pass_by("gradients", 8 * self._numel)
                ledger.set("gradients", 4 * self._numel)
            else:
                ledger.add("gradients", 4 * self._numel)
        ledger.sample_gradients()
        ledger.pass_by("buffers", 4 * self._largest * job.step_temporaries)
        ledger.set("gradients", 0)
