"""How the buckets of a round cross the network: averaging gradients into shards, and gathering weights from them.

Two ways with the same results and, on backends that have a native reduce-scatter, the same volume
(docs/internals.md has both side by side):

- :class:`OwnerSetTransport`: collectives per bucket, on the owners' process groups;
- :class:`AllToAllTransport`: all buckets of a round in one ``all_to_all_single`` over the workers, summed locally.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.mesh import Group, Owners
from deepspeed_sdp.engine.comm.stages import Arriving, Flow, Pending, Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch, TimedWork, named
from deepspeed_sdp.engine.comm.traffic import Traffic, all_gather_bytes, all_reduce_bytes
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket


def resolve_transport(asked: str, backend: str, stage: int, payload: Literal["gradients", "weights"]) -> str:
    """The transport that ``"auto"`` stands for; docs/benchmarks.md has the measurement.

    gloo has an all-gather but no reduce-scatter of its own; at stage 0 there is nothing to scatter. At stage 3 one
    sequence of gathers over the world needs no process groups of its own.
    """
    if asked != "auto":
        return asked
    scatters = stage > 0 and (payload == "gradients" or stage == 3)
    return "all_to_all" if backend == "gloo" and scatters else "owner_sets"


_AVERAGING, _GATHERING = "averaging gradients", "gathering weights"

# torch 2.13 gave them new names and warns of the old ones.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def start_scatter(flat: torch.Tensor, group: Group) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The work, and then what gives this rank's part ``[n]`` of the sum of ``flat`` ``[ranks * n]`` over ``group``.

    gloo has no reduce-scatter of its own: there it is an all-to-all and a sum here, in the order of the ranks.
    """
    parts = flat.view(len(group.ranks), -1)
    if group.backend == "gloo":
        received = torch.empty_like(parts)
        work = dist.all_to_all_single(received, parts, group=group.handle, async_op=True)
        return work, lambda: _sum(received.unbind(0)).to(flat.dtype)
    part = torch.empty_like(parts[group.place])
    return getattr(dist, _REDUCE_SCATTER)(part, flat, group=group.handle, async_op=True), lambda: part


def start_all_gather(output: torch.Tensor, shard: torch.Tensor, group: Group) -> Any:
    """The work that fills ``output`` ``[ranks * n]`` with the ``shard`` ``[n]`` of every rank."""
    return getattr(dist, _ALL_GATHER)(output, shard, group=group.handle, async_op=True)


def gather_inside(part: torch.Tensor, groups: Sequence[Group], timed: Callable[[Any, Group], TimedWork]) -> Flow:
    """The ``part`` ``[n]`` of every replica, by coordinate: ``[replicas * n]``, through at least one of ``groups``."""
    for group in reversed(groups):
        whole = torch.empty(len(group.ranks) * len(part), dtype=part.dtype, device=part.device)
        work = timed(start_all_gather(whole, part, group), group)
        if group is not groups[0]:
            yield work
        nbytes, part = _nbytes(part) + _nbytes(whole), whole
    return Arriving([work], lambda: [part], nbytes)


def gathered_inside(numel: int, levels: Sequence[int]) -> int:
    """Elements of the buffers of :func:`gather_inside` when its result is there, ``numel`` of them; pure."""
    return numel + numel // levels[0]


class Transport(Protocol):
    """Collective over the world: every rank calls it for the same rounds in the same order, with its own buckets."""

    def reduce(self, buckets: Sequence[OwnerBucket], grads: Sequence[torch.Tensor]) -> Pending:
        """Average ``grads`` (``[padded_numel]`` per bucket, may be overwritten) over the owners.

        The result is a list with this rank's averaged shard ``[shard_numel]`` of every bucket.
        """

    def gather(self, buckets: Sequence[FlatBucket], kind: str) -> Pending:
        """Fill ``flat`` of every bucket from the shards of those who share it; ``kind`` names the traffic."""


class OwnerSetTransport:
    """Collectives per bucket: all-reduce (ZeRO 0), or reduce-scatter and all-gather.

    With replicas one inside for each level, among those of a worker, and one outside, among the owners at one
    coordinate, of the slice that the inner ones leave (or gather). gloo has no reduce-scatter of its own (torch builds
    it from an all-reduce), so it is an all-reduce there, and counted as one; inside, where all have the same, an
    all-to-all and a local sum.
    """

    def __init__(self, stages: Stages, traffic: Traffic, stopwatch: Stopwatch) -> None:
        self._stages = stages
        self._traffic = traffic
        self._stopwatch = stopwatch

    @named("reduce gradients")
    def reduce(self, buckets: Sequence[OwnerBucket], grads: Sequence[torch.Tensor]) -> Pending:
        flows = [
            self._scatter(bucket, flat) if bucket.shards > 1 else self._all_reduce(bucket, flat)
            for bucket, flat in zip(buckets, grads, strict=True)
        ]
        return self._stages.start(flows, can_wait=True, nbytes=sum(map(_nbytes, grads)), held=grads)

    def _scatter(self, bucket: OwnerBucket, flat: torch.Tensor) -> Flow:
        """Inside, then of the slice outside."""
        _divide(flat, bucket)
        first, *others = bucket.owners.sharers.levels
        work, take = self._scatter_in(first, bucket, flat)
        for group in others:
            yield work
            work, take = self._scatter_in(group, bucket, take())
        return Arriving([work], lambda: [take()], _nbytes(flat))

    def _scatter_in(
        self, group: Group, bucket: OwnerBucket, flat: torch.Tensor
    ) -> tuple[TimedWork, Callable[[], torch.Tensor]]:
        """The sum over ``group`` of this rank's part of ``flat``."""
        is_gloo = group.backend == "gloo"
        if is_gloo and group is bucket.owners.sharers.outer:
            parts = flat.view(len(group.ranks), -1)
            return self._sum_in(group, bucket, flat), lambda: parts[group.place]
        ring = all_gather_bytes(_nbytes(flat), len(group.ranks))
        self._count("gradient_all_to_all" if is_gloo else "gradient_reduce_scatter", ring, bucket)
        work, take = start_scatter(flat, group)
        return self._stopwatch.timed(work, _AVERAGING, group), take

    def _sum_in(self, group: Group, bucket: OwnerBucket, flat: torch.Tensor) -> TimedWork:
        self._count("gradient_all_reduce", all_reduce_bytes(_nbytes(flat), len(group.ranks)), bucket)
        work = dist.all_reduce(flat, group=group.handle, async_op=True)
        return self._stopwatch.timed(work, _AVERAGING, group)

    def _all_reduce(self, bucket: OwnerBucket, flat: torch.Tensor) -> Flow:
        """Scattered inside, all-reduced outside, and gathered inside."""
        _divide(flat, bucket)
        *inside, last = bucket.owners.sharers.levels or (None,)
        if last is None:
            return Arriving([], lambda: [flat], _nbytes(flat))
        parts = [flat]
        for group in inside:
            work, take = self._scatter_in(group, bucket, parts[-1])
            yield work
            parts.append(take())
        work = self._sum_in(last, bucket, parts[-1])
        for group in reversed(inside):
            yield work
            part = parts.pop()
            work = self._gather_in(group, bucket, parts[-1], part, "gradient_all_gather", _AVERAGING)
        return Arriving([work], lambda: [flat], _nbytes(flat))

    @named("gather weights")
    def gather(self, buckets: Sequence[OwnerBucket], kind: str) -> Pending:
        return self._stages.start([
            self._gather_one(bucket, kind) if isinstance(bucket, FlatBucket) else self._gather_in_place(bucket, kind)
            for bucket in buckets
        ])  # fmt: skip

    def _gather_in_place(self, bucket: OwnerBucket, kind: str) -> Flow:
        """Inside alone: what replicas share of weights that lie in larger ones, where workers train apart."""
        groups = bucket.owners.sharers.inner if bucket.shards > 1 else ()
        if not groups:
            return Arriving([], list)
        start, stop = (min(place * bucket.shard_numel, bucket.numel) for place in (bucket.index, bucket.index + 1))
        part = torch.zeros(bucket.shard_numel, dtype=bucket.dtype, device=bucket.device)
        part[: stop - start] = bucket.read(start, stop)
        self._count(kind, all_gather_bytes(bucket.shards * _nbytes(part), bucket.shards), bucket)
        arriving = yield from gather_inside(part, groups, lambda work, of: self._stopwatch.timed(work, _GATHERING, of))

        def write() -> list[torch.Tensor]:
            bucket.write(0, arriving.take()[0][: bucket.numel])
            return []

        return arriving._replace(take=write)

    def _gather_one(self, bucket: FlatBucket, kind: str) -> Flow:
        """Outside, then inside."""
        part = bucket.shard.to(bucket.flat.device, non_blocking=True)
        if bucket.shards == 1 and bucket.shard.data_ptr() != bucket.flat.data_ptr():
            bucket.flat.copy_(part)
        works: list[TimedWork] = []
        groups = bucket.owners.sharers.levels if bucket.shards > 1 else ()
        # What each level gathers is this rank's part of what the next one does.
        wholes = [bucket.flat]
        for group in groups[:-1]:
            wholes.append(wholes[-1].view(len(group.ranks), -1)[group.place])
        for group in reversed(groups):
            if works:
                yield works.pop()
            whole = wholes.pop()
            works.append(self._gather_in(group, bucket, whole, part, kind, _GATHERING))
            part = whole
        return Arriving(works, list)

    def _gather_in(
        self, group: Group, bucket: OwnerBucket, whole: torch.Tensor, part: torch.Tensor, kind: str, what: str
    ) -> TimedWork:
        self._count(kind, all_gather_bytes(_nbytes(whole), len(group.ranks)), bucket)
        return self._stopwatch.timed(start_all_gather(whole, part, group), what, group)

    def _count(self, kind: str, nbytes: int, bucket: OwnerBucket) -> None:
        self._traffic.add(kind, nbytes, bucket.owner_set)


class AllToAllTransport:
    """All buckets of a round in one ``all_to_all_single``; a rank without a bucket in it takes part with nothing.

    With replicas it goes over the workers at one coordinate, and what it brings is one slice of each bucket: before it
    others average the slices inside, level by level, or after it all-gathers inside bring the others. Every shard is
    summed by the ranks that keep it, in the order of the ranks and in fp32 at least: the result depends on nothing but
    the gradients.

    Args:
        everyone: all ranks.
        device, dtype: of what is sent by a rank that has nothing to send.
    """

    def __init__(
        self,
        everyone: Owners,
        device: torch.device,
        dtype: torch.dtype,
        stages: Stages,
        traffic: Traffic,
        stopwatch: Stopwatch,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._inner, self._outer = everyone.inner, everyone.outer
        self._replicas, self._replica = everyone.replicas, everyone.replica
        self._rank = everyone.rank
        self._place_of = {rank: place for place, rank in enumerate(everyone.peers)}
        self._stages = stages
        self._traffic = traffic
        self._stopwatch = stopwatch

    @named("reduce gradients")
    def reduce(self, buckets: Sequence[OwnerBucket], grads: Sequence[torch.Tensor]) -> Pending:
        for bucket, flat in zip(buckets, grads, strict=True):
            self._count("gradient_all_to_all", bucket, flat.element_size())
        nbytes = 2 * sum(map(_nbytes, grads))
        return self._stages.start([self._reduce(buckets, grads)], can_wait=True, nbytes=nbytes, held=grads)

    def _reduce(self, buckets: Sequence[OwnerBucket], slices: Sequence[torch.Tensor]) -> Flow:
        for group in self._inner:
            if not buckets:
                # Outside it comes after the rounds before, like that of those who have something.
                yield None
                continue
            ranks = len(group.ranks)
            sizes = [flat.numel() // ranks for flat in slices]
            send = torch.cat([flat.view(ranks, -1) for flat in slices], dim=1)
            slices = ()
            received = torch.empty_like(send)
            work = dist.all_to_all_single(received, send, group=group.handle, async_op=True)
            yield self._stopwatch.timed(work, _AVERAGING, group)
            slices = torch.split(_mean(received.unbind(0)).to(send.dtype), sizes)
            del send, received
        pieces: list[list[torch.Tensor]] = [[] for _ in self._place_of]
        for bucket, flat in zip(buckets, slices, strict=True):
            for rank, piece in zip(bucket.owners.peers, torch.split(flat, bucket.shard_numel), strict=True):
                pieces[self._place_of[rank]].append(piece)
        # The shards of one bucket lie in the order of its ranks.
        works, received, sizes = self._exchange(_AVERAGING, pieces, slices[0] if len(slices) == 1 else None)

        # It holds what was received, and nothing of what was sent.
        def take() -> list[torch.Tensor]:
            by_place = torch.split(received, sizes)
            taken = [0] * len(sizes)
            shards = []
            for bucket in buckets:
                of_bucket = []
                for place in map(self._place_of.__getitem__, bucket.owners.peers):
                    of_bucket.append(by_place[place].narrow(0, taken[place], bucket.shard_numel))
                    taken[place] += bucket.shard_numel
                shards.append(_mean(of_bucket))
            return shards

        return Arriving(works, take, 2 * _nbytes(received))

    @named("gather weights")
    def gather(self, buckets: Sequence[FlatBucket], kind: str) -> Pending:
        for bucket in buckets:
            self._count(kind, bucket, bucket.shard.element_size())
        return self._stages.start([self._gather(buckets)])

    def _gather(self, buckets: Sequence[FlatBucket]) -> Flow:
        pieces: list[list[torch.Tensor]] = [[] for _ in self._place_of]
        shards = [bucket.shard.to(bucket.flat.device, non_blocking=True) for bucket in buckets]
        for bucket, shard in zip(buckets, shards, strict=True):
            for rank in bucket.owners.peers:
                if rank != self._rank:
                    pieces[self._place_of[rank]].append(shard)
        works, received, sizes = self._exchange(_GATHERING, pieces)

        def fill() -> list[torch.Tensor]:
            by_place = torch.split(received, sizes)
            taken = [0] * len(sizes)
            for bucket, shard in zip(buckets, shards, strict=True):
                own_slice = bucket.flat.view(self._replicas, -1)[self._replica]
                for rank, piece in zip(bucket.owners.peers, torch.split(own_slice, len(shard)), strict=True):
                    place = self._place_of[rank]
                    if rank != self._rank:
                        piece.copy_(by_place[place].narrow(0, taken[place], len(shard)))
                        taken[place] += len(shard)
                    elif piece.data_ptr() != shard.data_ptr():
                        piece.copy_(shard)
            return []

        if not self._inner or not buckets:
            return Arriving(works, fill, 2 * _nbytes(received))
        yield from works
        fill()
        slices = [bucket.flat.view(self._replicas, -1) for bucket in buckets]
        gathered = torch.cat([of_bucket[self._replica] for of_bucket in slices])
        flow = gather_inside(gathered, self._inner, lambda work, group: self._stopwatch.timed(work, _GATHERING, group))
        arriving = yield from flow

        def spread() -> list[torch.Tensor]:
            (gathered,) = arriving.take()
            of_buckets = torch.split(gathered.view(self._replicas, -1), [s.shape[1] for s in slices], dim=1)
            for whole, of_bucket in zip(slices, of_buckets, strict=True):
                whole.copy_(of_bucket)
            return []

        return arriving._replace(take=spread)

    def _exchange(
        self, what: str, pieces: Sequence[Sequence[torch.Tensor]], whole: torch.Tensor | None = None
    ) -> tuple[list[TimedWork], torch.Tensor, list[int]]:
        """What this rank sends to a rank is as large as what it gets from it: the shards of their common buckets.

        ``whole``: a tensor in which the pieces already lie one after the other.
        """
        sizes = [sum(piece.numel() for piece in of_rank) for of_rank in pieces]
        flat = [piece for of_rank in pieces for piece in of_rank]
        if not flat:
            send = torch.empty(0, dtype=self._dtype, device=self._device)
        else:
            send = whole if whole is not None else torch.cat(flat)
        if self._outer is None:
            return [], send, sizes
        received = torch.empty_like(send)
        work = dist.all_to_all_single(received, send, sizes, sizes, group=self._outer.handle, async_op=True)
        return [self._stopwatch.timed(work, what, self._outer)], received, sizes

    def _count(self, kind: str, bucket: OwnerBucket, element_size: int) -> None:
        nbytes = (bucket.shards - 1) * bucket.shard_numel * element_size
        self._traffic.add(kind, nbytes, bucket.owner_set)


def _divide(flat: torch.Tensor, bucket: OwnerBucket) -> None:
    # Before the sum, so that low precision does not overflow.
    if len(bucket.owners.sharers.ranks) > 1:
        flat.div_(len(bucket.owners.sharers.ranks))


def _mean(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return _sum(pieces).div_(len(pieces))


def _sum(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """In their order, in fp32 at least."""
    total = torch.zeros(pieces[0].shape, dtype=sum_dtype(pieces[0].dtype), device=pieces[0].device)
    for piece in pieces:
        total += piece
    return total


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which this rank sums what came in ``dtype``."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
