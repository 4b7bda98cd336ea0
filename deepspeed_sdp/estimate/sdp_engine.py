"""A step of the SDP engine in bytes: what ``engine/`` allocates and frees, in its order.

The passes come from :mod:`~deepspeed_sdp.estimate.trace`, the buckets from :mod:`~deepspeed_sdp.estimate.buckets`; here
stands what the engine does between: ``gradients.py`` and ``transport.py`` in the backward pass,
``optimizer.py`` and ``refresh.py`` in the step.
"""

from collections import deque
from collections.abc import Sequence

import torch

from deepspeed_sdp.estimate.buckets import Bucket, Layout
from deepspeed_sdp.estimate.exchange import exchanges
from deepspeed_sdp.estimate.gathered import GatheredParts
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.ledger import Ledger
from deepspeed_sdp.estimate.trace import Moment
from deepspeed_sdp.estimate.worker_model import WorkerModel
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import SHARED

# As in ``engine/zero/gradients.py`` and ``engine/zero/refresh.py``.
_ROUNDS_IN_FLIGHT = 2
_PORTIONS_IN_FLIGHT = 2
_STEP_COUNTER = 4


class EngineStep:
    """Replays one step of one rank.

    Args:
        is_tied: whether the output head's weight is the embedding's.
    """

    def __init__(self, job: Job, model: WorkerModel, plan: SubnetworkPlan, layout: Layout, is_tied: bool) -> None:
        self._job, self._model, self._layout = job, model, layout
        is_backward = job.sdp is not None and job.sdp.masking == "backward"
        self._exchanges = exchanges(job, model, plan, layout) if is_backward else []
        self.ledger = Ledger()
        self._width = job.dtype.itemsize
        self._average_width = job.accumulate_dtype.itemsize
        self._weights = {weight.local: weight for weight in model.trained}
        self._is_eager = job.stage < 3
        self._gradients: dict[str, int] = {}
        self._averaged: set[Bucket] = set()
        self._in_flight: deque[tuple[tuple[Bucket, ...], int]] = deque()
        self._gathered = (
            GatheredParts(job, layout, self.ledger, is_tied, self._launch_before) if job.stage == 3 else None
        )
        # Portions on their way: index, and bytes of the engine's buffers. What gloo copies of the newest besides.
        self._under_way: deque[tuple[int, int]] = deque()
        self._copies: deque[int] = deque()
        self._is_lazy = bool(self._exchanges) and job.sdp is not None and job.sdp.backward.overlap_refresh
        self._hold_state()

    def _hold_state(self) -> None:
        job, ledger, width = self._job, self.ledger, self._width
        weights = self._model.held * width + self._model.buffer_bytes
        optimizer = 0
        for bucket in self._layout.buckets:
            held = bucket.shard if job.stage == 3 else bucket.numel if bucket.in_place else bucket.padded
            if not (bucket.in_place or (job.stage == 3 and job.offload_param)):
                weights += held * width
            is_own_master = job.dtype == torch.float32 and not bucket.in_place and not job.offload_optimizer
            optimizer += bucket.shard * 4 * (job.moments + (not is_own_master)) + _STEP_COUNTER * (job.moments == 2)
        ledger.add("weights", weights)
        ledger.add("optimizer", 0 if job.offload_optimizer else optimizer)

    def run(self, moments: Sequence[Moment]) -> Ledger:
        """All passes and the update."""
        # What accumulates is there after the second micro-batch, and the same in all that follow.
        for is_boundary in [False, True] if self._job.accumulation > 1 else [True]:
            self._run_passes(moments, is_boundary)
        self._step()
        if self._is_lazy:
            self._run_forward_again(moments)
        return self.ledger

    def _run_passes(self, moments: Sequence[Moment], is_boundary: bool) -> None:
        reduces = is_boundary or self._job.stage >= 2
        self._start_round(reduces)
        for moment in moments:
            self.ledger.phase = "forward" if moment.kind in ("forward", "loss") else "backward"
            self.ledger.set("activations", moment.peak)
            self.ledger.set("activations", moment.live)
            if moment.kind == "gradient":
                self._on_gradient(moment.weight, reduces)
            elif self._gathered is not None:
                self._gathered.at(moment)
        if reduces:
            self._launch_before(len(self._layout.rounds))
            while self._in_flight:
                self._take()
        if self._gathered is not None:
            self._gathered.end()

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _start_round(self, reduces: bool) -> None:
        self._reduces = reduces
        self._waiting = [{w.local for b in buckets for w in b.weights} for buckets in self._layout.rounds]
        self._next = 0

    def _on_gradient(self, name: str, reduces: bool) -> None:
        numel, ledger = self._weights[name].numel, self.ledger
        nbytes = numel * self._width
        ledger.sample_gradients(nbytes - (self._gathered.pending_bytes if self._gathered else 0))
        if self._job.accumulate_dtype == self._job.dtype:
            if name not in self._gradients:
                self._hold(name, nbytes)
        else:
            in_sum = numel * self._job.accumulate_dtype.itemsize
            ledger.pass_by("gradients", nbytes + in_sum)
            if name not in self._gradients:
                self._hold(name, in_sum)
        if reduces:
            for round_ in self._layout.segmentation.spans[self._weights[name].place]:
                self._waiting[round_].discard(name)
            if self._is_eager:
                self._launch_before(self._complete())

    def _hold(self, name: str, nbytes: int) -> None:
        self._gradients[name] = nbytes
        self.ledger.add("gradients", nbytes)

    def _complete(self) -> int:
        end = self._next
        for round_ in range(self._next, len(self._waiting)):
            if self._waiting[round_]:
                break
            if self._layout.rounds[round_]:
                end = round_ + 1
        return end

    def _launch_before(self, round_: int) -> None:
        while self._reduces and self._next < round_:
            self._launch_next()

    def _launch_next(self) -> None:
        while len(self._in_flight) >= _ROUNDS_IN_FLIGHT:
            self._take()
        buckets = self._layout.rounds[self._next]
        self._next += 1
        flats = [bucket.padded * self._job.reduce_dtype.itemsize for bucket in buckets]
        for bucket, flat in zip(buckets, flats, strict=True):
            self.ledger.add("buffers", flat)
            for weight in bucket.ends:
                self.ledger.add("gradients", -self._gradients.pop(weight.local, 0))
        self._in_flight.append((buckets, self._send(buckets, sum(flats))))

    def _send(self, buckets: Sequence[Bucket], flat: int) -> int:
        """Bytes of buffers that live until the round is taken; the flat gradients are counted already."""
        if self._job.transport("gradients") == "all_to_all":
            # What is received is as large; several buckets are put together before.
            self.ledger.pass_by("buffers", flat * (2 if len(buckets) > 1 else 1))
            self.ledger.add("buffers", flat)
            return 2 * flat
        received = 0
        if self._job.backend != "gloo" and self._job.stage > 0:
            received += sum(b.shard for b in buckets if b.owners > 1) * self._job.reduce_dtype.itemsize
        if any(bucket.replicas > 1 for bucket in buckets):
            # Inside: the whole on gloo, which has an all-to-all there, else a slice.
            received += flat if self._job.backend == "gloo" else flat // buckets[0].replicas
        self.ledger.add("buffers", received)
        return flat + received

    def _take(self) -> None:
        buckets, buffers = self._in_flight.popleft()
        sums = 0
        if self._job.transport("gradients") == "all_to_all":
            sums = sum(bucket.shard for bucket in buckets) * max(4, self._job.reduce_dtype.itemsize)
            self.ledger.add("buffers", sums)
        kept = 0
        for bucket in buckets:
            nbytes = bucket.shard * self._average_width
            if bucket in self._averaged:
                self.ledger.pass_by("gradients", nbytes)
                continue
            self._averaged.add(bucket)
            if self._is_kept_as_it_is(bucket):
                kept += nbytes
            self.ledger.add("gradients", nbytes if not self._is_kept_as_it_is(bucket) else 0)
        self.ledger.add("buffers", -buffers - sums)
        self.ledger.add("gradients", kept)

    def _is_kept_as_it_is(self, bucket: Bucket) -> bool:
        """Whether what arrives is the average, not copied: a tensor of its own in the dtype of averages."""
        job = self._job
        if job.transport("gradients") == "all_to_all":
            return self._average_width == max(4, job.reduce_dtype.itemsize)
        is_own = bucket.shards == 1 or (job.backend != "gloo" and bucket.owners > 1)
        return is_own and self._average_width == job.reduce_dtype.itemsize

    # -- the update --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self.ledger.phase = "step"
        average = self._job.accumulate_dtype.itemsize
        budget = average * sum(bucket.shard for bucket in self._layout.buckets) * self._is_lazy
        for index, portion in enumerate(self._layout.portions):
            self._step_portion([bucket for round_ in portion for bucket in self._layout.rounds[round_]])
            while len(self._under_way) >= _PORTIONS_IN_FLIGHT and sum(n for _, n in self._under_way) >= budget:
                self._arrive()
            buffers, copies = self._refresh(index, portion)
            self._under_way.append((index, buffers))
            self._copies.append(copies)
            # Of those before, most are there, and only wait to be taken.
            self._drop_copies(_PORTIONS_IN_FLIGHT)
        if not self._is_lazy:
            self._settle(len(self._layout.portions))

    def _arrive(self) -> None:
        self.ledger.add("buffers", -self._under_way.popleft()[1])
        self._drop_copies(len(self._under_way))

    def _drop_copies(self, most: int) -> None:
        while len(self._copies) > most:
            self.ledger.add("buffers", -self._copies.popleft())

    def _settle(self, through: int) -> None:
        while self._under_way and self._under_way[0][0] <= through:
            self._arrive()

    def _run_forward_again(self, moments: Sequence[Moment]) -> None:
        """The next forward pass, each part of which waits for the portions that hold its weights."""
        portion_of = {round_: index for index, portion in enumerate(self._layout.portions) for round_ in portion}
        needed = [-1] * (self._model.last_part + 1)
        for part, rounds in zip(self._model.parts, self._layout.segmentation.spans, strict=True):
            needed[part] = max(needed[part], *(portion_of[round_] for round_ in rounds))
        self.ledger.phase = "forward"
        for moment in moments:
            self.ledger.set("activations", moment.peak)
            self.ledger.set("activations", moment.live)
            if moment.kind == "loss":
                break
            self._settle(needed[moment.part])

    def _step_portion(self, buckets: Sequence[Bucket]) -> None:
        shards, largest = sum(b.shard for b in buckets), max((b.shard for b in buckets), default=0)
        if self._average_width != 4:
            self.ledger.add("gradients", 4 * shards)
            self.ledger.add("gradients", -self._average_width * shards)
        # The engine does not count what gloo copies.
        self.ledger.sample_gradients(-sum(self._copies))
        if not self._job.offload_optimizer:
            self.ledger.pass_by("buffers", 4 * largest * self._job.step_temporaries)
        self.ledger.add("gradients", -4 * shards)

    def _refresh(self, index: int, portion: range) -> tuple[int, int]:
        """Send the stepped weights; bytes of the engine's buffers, and of gloo's copies of them."""
        buffers = copies = 0
        flats = [b for r in portion for b in self._layout.rounds[r] if not b.in_place and b.shards > 1]
        if self._exchanges:
            flats = [bucket for bucket in flats if bucket.weights[0].owner_set == SHARED]
        if 0 < self._job.stage < 3:
            if self._job.transport("weights") == "all_to_all":
                buffers = sum(bucket.brought for bucket in flats) * self._width
            elif self._job.backend == "gloo":
                # gloo gathers into a tensor of its own, and copies.
                copies = sum(bucket.padded for bucket in flats) * self._width
        if self._exchanges:
            exchange = self._exchanges[index]
            self.ledger.pass_by("buffers", buffers + copies + exchange.live + exchange.passing)
            buffers += exchange.counted
            copies += exchange.live - exchange.counted
        self.ledger.add("buffers", buffers + copies)
        return buffers, copies
