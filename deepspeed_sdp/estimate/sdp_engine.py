"""A step of the SDP engine in bytes: what ``engine/`` allocates and frees, in its order.

The passes come from :mod:`~deepspeed_sdp.estimate.trace`; buckets, their order, and when they leave are the engine's
own (:mod:`~deepspeed_sdp.estimate.buckets`); what they take on their way is in :mod:`~deepspeed_sdp.estimate.wire`.
Here stands what lives meanwhile: gradients, their averages, and fp32 copies at the update.
"""

from collections import Counter, deque
from collections.abc import Sequence
from itertools import chain

from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.engine.zero.host_copies import buffer_numels
from deepspeed_sdp.engine.zero.launches import Launches
from deepspeed_sdp.engine.zero.rounds import Portion, last_portion
from deepspeed_sdp.estimate.buckets import Layout
from deepspeed_sdp.estimate.gathered import GatheredParts
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.ledger import Ledger
from deepspeed_sdp.estimate.trace import Moment
from deepspeed_sdp.estimate.wire import Wire
from deepspeed_sdp.estimate.worker_model import WorkerModel

_STEP_COUNTER = 4


class EngineStep:
    """Replays one step of one rank.

    Attributes:
        model, layout: of the rank.
        ledger: bytes on the GPU.
        host: bytes of state, of weights and of buffers for their copies in the host's memory.
        sent: bytes that the rank sends in the step, by the engine's names of kinds; shards with their padding.
    """

    def __init__(self, job: Job, model: WorkerModel, layout: Layout) -> None:
        self._job, self.model, self.layout = job, model, layout
        self._wire = Wire(job, layout)
        self.ledger = Ledger()
        self.host = 0
        self.sent: Counter[str] = Counter()
        self._width = job.dtype.itemsize
        self._average_width = job.accumulate_dtype.itemsize
        self._indices = {weight.local: index for index, weight in enumerate(model.trained)}
        self._launches = Launches([{i for b in of_round for i in b.items} for of_round in layout.rounds])
        self._gradients: dict[int, int] = {}
        self._averaged: set[BucketShape] = set()
        self._in_flight: deque[tuple[tuple[BucketShape, ...], int]] = deque()
        self._gathered = (
            GatheredParts(job, layout, self.ledger, self._wire, self._launch_before) if job.stage == 3 else None
        )
        # Portions on their way: index, and bytes of the engine's buffers. What gloo copies of the newest besides.
        self._under_way: deque[tuple[int, int]] = deque()
        self._copies: deque[int] = deque()
        self._hold_state()

    def _hold_state(self) -> None:
        job, ledger, width = self._job, self.ledger, self._width
        weights, optimizer = self.model.held * width + self.model.buffer_bytes, 0
        rests_on_host = job.stage == 3 and job.offload_param
        for bucket in self.layout.buckets:
            held = bucket.shard_numel if job.stage == 3 else bucket.numel if bucket.in_place else bucket.padded_numel
            if rests_on_host:
                self.host += held * width
            elif not bucket.in_place:
                weights += held * width
            has_master = not bucket.is_own_master(job.dtype, job.offload_optimizer == rests_on_host)
            optimizer += bucket.shard_numel * 4 * (job.moments + has_master) + _STEP_COUNTER * (job.moments == 2)
            optimizer += self._held_apart(bucket)
        ledger.add("weights", weights)
        ledger.add("optimizer", 0 if job.offload_optimizer else optimizer)
        if job.offload_optimizer:
            steps = (sum(b.shard_numel for b in chain.from_iterable(portion.owned)) for portion in self.layout.step)
            coming, going = buffer_numels(max(steps), sends=not job.offload_param)
            self.host += optimizer + sum(coming) * 4 + sum(going) * width

    def _held_apart(self, bucket: BucketShape) -> int:
        """Of local steps: the outer optimizer's slices, and where owners agree beside training what is under way."""
        assert self._job.sdp is not None
        schedule, ranks = self._job.sdp.schedule, len(bucket.owners.ranks)
        slices = bucket.padded_numel // ranks if ranks > bucket.owners.replicas else bucket.shard_numel
        outer = 2 * slices if schedule.outer_optimizer is not None else 0
        return 4 * (outer + 2 * bucket.shard_numel * (schedule.sync_delay > 0))

    def run(self, moments: Sequence[Moment]) -> Ledger:
        """All passes and the update."""
        # What accumulates is there after the second micro-batch, and the same in all that follow.
        before = self._job.accumulation - 1
        if before:
            self._run_passes(moments, is_boundary=False)
            self.sent = Counter({kind: nbytes * before for kind, nbytes in self.sent.items()})
        self._run_passes(moments, is_boundary=True)
        self._step()
        if self.layout.rules.is_lazy:
            self._run_forward_again(moments)
        return self.ledger

    def _run_passes(self, moments: Sequence[Moment], is_boundary: bool) -> None:
        self._reduces = is_boundary or self._job.stage >= 2
        gathered = self._gathered.sent if self._gathered is not None else 0
        self._launches.begin()
        for moment in moments:
            self.ledger.phase = "forward" if moment.kind in ("forward", "loss") else "backward"
            self.ledger.set("activations", moment.peak)
            self.ledger.set("activations", moment.live)
            if moment.kind == "gradient":
                self._on_gradient(self._indices[moment.weight])
            elif self._gathered is not None:
                self._gathered.at(moment)
        self._launch_before(len(self._launches))
        while self._in_flight:
            self._take()
        if self._gathered is not None:
            self._gathered.end()
            self.sent["weight_gather"] += self._gathered.sent - gathered

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _on_gradient(self, index: int) -> None:
        numel, ledger = self.model.trained[index].numel, self.ledger
        nbytes = numel * self._width
        ledger.sample_gradients(nbytes - (self._gathered.pending_bytes if self._gathered else 0))
        if self._job.accumulate_dtype == self._job.dtype:
            in_sum = nbytes
        else:
            in_sum = numel * self._average_width
            ledger.pass_by("gradients", nbytes + in_sum)
        if index not in self._gradients:
            self._gradients[index] = in_sum
            ledger.add("gradients", in_sum)
        if self._reduces:
            self._launches.arrive(index)
            if self._job.stage < 3:
                self._launch_before(self._launches.complete)

    def _launch_before(self, round_: int) -> None:
        while self._reduces and self._launches.next < round_:
            self._launch_next()

    def _launch_next(self) -> None:
        while len(self._in_flight) >= self._launches.most:
            self._take()
        buckets = self.layout.rounds[self._launches.launch()]
        flat = 0
        for bucket in buckets:
            nbytes = bucket.padded_numel * self._job.reduce_dtype.itemsize
            flat += nbytes
            self.ledger.add("buffers", nbytes)
            for index in bucket.items:
                if self._launches.is_used_up(index):
                    self.ledger.add("gradients", -self._gradients.pop(index, 0))
        moved = self._wire.reduce(buckets)
        self.sent["gradients"] += moved.sent
        self.ledger.pass_by("buffers", moved.passing)
        self.ledger.add("buffers", moved.buffers)
        self._in_flight.append((buckets, flat + moved.buffers))

    def _take(self) -> None:
        buckets, buffers = self._in_flight.popleft()
        sums = self._wire.summed(buckets)
        self.ledger.add("buffers", sums)
        kept = 0
        for bucket in buckets:
            nbytes = bucket.shard_numel * self._average_width
            if bucket in self._averaged:
                self.ledger.pass_by("gradients", nbytes)
                continue
            self._averaged.add(bucket)
            # A tensor of its own in the dtype of averages is not copied.
            if self._wire.average_dtype == self._job.accumulate_dtype and self._wire.has_own_memory(bucket):
                kept += nbytes
            else:
                self.ledger.add("gradients", nbytes)
        self.ledger.add("buffers", -buffers - sums)
        self.ledger.add("gradients", kept)

    # -- the update --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self.ledger.phase = "step"
        rules = self.layout.rules
        for index, portion in enumerate(self.layout.step):
            self._step_portion(list(chain.from_iterable(portion.owned)))
            while rules.must_wait(len(self._under_way), sum(nbytes for _, nbytes in self._under_way)):
                self._arrive()
            buffers, copies = self._refresh(portion)
            self._under_way.append((index, buffers))
            self._copies.append(copies)
            # Of those before, most are there, and only wait to be taken.
            self._drop_copies(rules.least)
        if not rules.is_lazy:
            self._settle(len(self.layout.step))
        self._agree()

    def _agree(self) -> None:
        """Once a round, of which a step sends its share."""
        assert self._job.sdp is not None
        sent: Counter[str] = Counter()
        for portion in self.layout.agreement:
            moved = self._wire.agree(list(chain.from_iterable(portion.owned)))
            self.ledger.pass_by("buffers", moved.passing)
            sent["outer_average"] += moved.sent
            for kind, of in (
                ("weight_gather", self._wire.gather(portion.gathered)),
                ("weight_refresh", self._wire.exchange(portion.exchanged)),
            ):
                self.ledger.pass_by("buffers", of.buffers + of.copied + of.passing)
                sent[kind] += of.sent
        for kind, nbytes in sent.items():
            self.sent[kind] += nbytes // self._job.sdp.schedule.sync_interval

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
        needed = [last_portion(self.layout.step, rounds) for rounds in self.layout.parts]
        self.ledger.phase = "forward"
        for moment in moments:
            self.ledger.set("activations", moment.peak)
            self.ledger.set("activations", moment.live)
            if moment.kind == "loss":
                break
            if (through := needed[moment.part]) is not None:
                self._settle(through)

    def _step_portion(self, buckets: Sequence[BucketShape]) -> None:
        shards, largest = sum(b.shard_numel for b in buckets), max((b.shard_numel for b in buckets), default=0)
        if self._average_width != 4:
            self.ledger.add("gradients", 4 * shards)
            self.ledger.add("gradients", -self._average_width * shards)
        # The engine does not count what gloo copies.
        self.ledger.sample_gradients(-sum(self._copies))
        if not self._job.offload_optimizer:
            self.ledger.pass_by("buffers", 4 * largest * self._job.step_temporaries)
        self.ledger.add("gradients", -4 * shards)

    def _refresh(self, portion: Portion[BucketShape]) -> tuple[int, int]:
        """Send the stepped weights; bytes of the engine's buffers, and of gloo's copies of them."""
        gathered, exchanged = self._wire.gather(portion.gathered), self._wire.exchange(portion.exchanged)
        self.sent["weight_gather"] += gathered.sent
        self.sent["weight_refresh"] += exchanged.sent
        moved = [gathered, exchanged]
        buffers, copies = sum(m.buffers for m in moved), sum(m.copied for m in moved)
        self.ledger.pass_by("buffers", buffers + copies + exchanged.passing)
        self.ledger.add("buffers", buffers + copies)
        return buffers, copies
