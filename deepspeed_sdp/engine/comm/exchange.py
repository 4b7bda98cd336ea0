"""Backward masking: updated weights on their way from their owners to every rank, which all compute with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.mesh import Group, Owners
from deepspeed_sdp.engine.comm.stages import Arriving, Flow, Pending, Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch, TimedWork, named
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import gather_inside, start_all_gather
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket

KIND = "weight_refresh"

# Of the volume: how much padding an all-gather, which takes equal pieces, may cost instead of an all-to-all.
_PADDING = 0.05


Shape = TypeVar("Shape", bound=BucketShape)


@dataclass(frozen=True)
class Share(Generic[Shape]):
    """Elements ``[start, stop)`` of a bucket's flat vector, as one owner sends them."""

    bucket: Shape
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements of it."""
        return self.stop - self.start


@dataclass(frozen=True)
class Route(Generic[Shape]):
    """Who sends what of some buckets to whom; worked out once. The first three go over the workers at one coordinate.

    Attributes:
        sent: the shares that this rank sends.
        receivers: for each of them, the places among the workers of those that lack it, ascending.
        received: by place of the sender, the shares that this rank lacks.
        all_gather_numel: elements of every rank's piece, where one all-gather serves; else 0.
        inside: where there are replicas, what goes inside then: the buckets that a worker lacks something of.
    """

    sent: tuple[Share[Shape], ...]
    receivers: tuple[tuple[int, ...], ...]
    received: tuple[tuple[Share[Shape], ...], ...]
    all_gather_numel: int
    inside: tuple[Shape, ...]

    @property
    def sent_numel(self) -> int:
        """Elements that this rank sends to other workers, padding included."""
        if self.all_gather_numel:
            return self.all_gather_numel * (len(self.received) - 1)
        return sum(share.numel * len(to) for share, to in zip(self.sent, self.receivers, strict=True))

    @property
    def buffers(self) -> tuple[int, int]:
        """Elements of the buffers of what is sent to other workers, and of what comes from them."""
        if self.all_gather_numel:
            return self.all_gather_numel, self.all_gather_numel * len(self.received)
        return self.sent_numel, sum(share.numel for of_sender in self.received for share in of_sender)


class Exchange:
    """Moves the weights of many buckets at once, to all ranks.

    Every owner of a bucket sends an equal share of it, so none sends more than the others, and every rank receives each
    element that it lacks once: at ZeRO 0 what it does not own, at ZeRO 1 and 2, where a step updates one shard, all
    other shards too. One message for each call, whatever the number of buckets; with replicas some more: at their
    coordinate workers receive a slice, and an all-gather inside, level by level, brings the others.

    Args:
        everyone: all ranks, with groups on which all issue what runs on them in the same order.
        is_sharded: see :class:`OwnerBucket`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        everyone: Owners,
        is_sharded: bool,
        device: torch.device,
        dtype: torch.dtype,
        stages: Stages,
        traffic: Traffic,
        stopwatch: Stopwatch,
    ) -> None:
        self._everyone = everyone
        self._is_sharded = is_sharded
        self._device, self._dtype = device, dtype
        self._stages = stages
        self._traffic = traffic
        self._stopwatch = stopwatch

    def route(self, buckets: Sequence[OwnerBucket]) -> Route[OwnerBucket]:
        """How ``buckets`` travel; the same on all ranks, whether they own them or not."""
        return route_of(buckets, self._everyone, self._is_sharded)

    @named("refresh weights")
    def start(self, route: Route[OwnerBucket]) -> Pending:
        """Collective. Send this rank's shares; ``finish`` of the result writes what came from others."""
        for share, receivers in zip(route.sent, route.receivers, strict=True):
            self._count(share.numel * len(receivers), share.bucket.owner_set)
        return self._stages.start([self._flow(route)])

    def _flow(self, route: Route[OwnerBucket]) -> Flow:
        """Outside, then inside."""
        arriving = self._all_gather(route) if route.all_gather_numel else self._all_to_all(route)
        if not self._everyone.inner:
            return arriving
        yield from arriving.works
        arriving.take()
        return (yield from self._spread(route))

    def _all_gather(self, route: Route[OwnerBucket]) -> Arriving:
        numel, total = route.buffers
        send = torch.empty(numel, dtype=self._dtype, device=self._device)
        taken = _read(route.sent, send)
        self._count((numel - taken) * (len(route.received) - 1))
        received = torch.empty(total, dtype=self._dtype, device=self._device)
        group = self._everyone.outer
        works = [self._timed(start_all_gather(received, send, group), group)] if group else []
        return _arriving(works, route.received, torch.split(received, numel), send, received)

    def _all_to_all(self, route: Route[OwnerBucket]) -> Arriving:
        pieces: list[list[torch.Tensor]] = [[] for _ in route.received]
        for share, receivers in zip(route.sent, route.receivers, strict=True):
            value = share.bucket.read(share.start, share.stop)
            for place in receivers:
                pieces[place].append(value)
        sizes = [sum(map(len, of_rank)) for of_rank in pieces]
        sent = [piece for of_rank in pieces for piece in of_rank]
        send = torch.cat(sent) if sent else torch.empty(0, dtype=self._dtype, device=self._device)
        expected = [sum(share.numel for share in of_rank) for of_rank in route.received]
        received = torch.empty(route.buffers[1], dtype=self._dtype, device=self._device)
        works, group = [], self._everyone.outer
        if group is not None:
            work = dist.all_to_all_single(received, send, expected, sizes, group=group.handle, async_op=True)
            works = [self._timed(work, group)]
        return _arriving(works, route.received, torch.split(received, expected), send, received)

    def _spread(self, route: Route[OwnerBucket]) -> Flow:
        """This rank's slices to the other replicas, whose slices it lacks. The last ones may be shorter, or empty."""
        replicas, replica = self._everyone.replicas, self._everyone.replica
        sizes = [slice_numel(bucket) for bucket in route.inside]
        send = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        own = []
        for bucket, size, values in zip(route.inside, sizes, torch.split(send, sizes), strict=True):
            start, stop = (min(place * size, bucket.numel) for place in (replica, replica + 1))
            values[: stop - start] = bucket.read(start, stop)
            own.append((start, stop))
        self._count(len(send) * (replicas - 1))
        arriving = yield from gather_inside(send, self._everyone.inner, self._timed)

        def write() -> list[torch.Tensor]:
            (received,) = arriving.take()
            by_bucket = torch.split(received.view(replicas, -1), sizes, dim=1)
            for bucket, (start, stop), slices in zip(route.inside, own, by_bucket, strict=True):
                values = slices.reshape(-1)
                bucket.write(0, values[:start])
                bucket.write(stop, values[stop : bucket.numel])
            return []

        return arriving._replace(take=write)

    def _timed(self, work: Any, group: Group) -> TimedWork:
        return self._stopwatch.timed(work, "refreshing weights", group)

    def _count(self, numel: int, owner_set: int = 0) -> None:
        self._traffic.add(KIND, numel * self._dtype.itemsize, owner_set)


def route_of(buckets: Sequence[Shape], everyone: Owners, is_sharded: bool) -> Route[Shape]:
    """See :meth:`Exchange.route`. Pure."""
    rail = everyone.peers
    own = rail.index(everyone.rank)

    def lacks(bucket: Shape, place: int, sender: int) -> bool:
        return sender != place and (is_sharded or rail[place] not in bucket.owners)

    shares = [[Share(b, *b.share_of(rank)) for b in buckets if rank in b.owners] for rank in rail]
    totals = [sum(share.numel for share in of_rank) for of_rank in shares]
    is_even = len(rail) > 1 and len(rail) * max(totals) <= (1 + _PADDING) * sum(totals)
    sent = tuple(shares[own])
    return Route(
        sent,
        tuple(tuple(p for p in range(len(rail)) if lacks(s.bucket, p, own)) for s in sent),
        tuple(
            tuple(share for share in of_rank if lacks(share.bucket, own, sender))
            for sender, of_rank in enumerate(shares)
        ),
        max(totals) if is_sharded and is_even else 0,
        tuple(b for b in buckets if everyone.replicas > 1 and (is_sharded or not b.is_owned)),
    )


def slice_numel(bucket: BucketShape) -> int:
    """Elements of the shares of a bucket's owners at one coordinate, which lie one after the other."""
    ranks = bucket.owners.ranks
    return min(bucket.share_of(ranks[0])[1] * len(ranks) // bucket.owners.replicas, bucket.numel)


def _read(shares: Sequence[Share[OwnerBucket]], values: torch.Tensor) -> int:
    taken = 0
    for share in shares:
        values[taken : taken + share.numel] = share.bucket.read(share.start, share.stop)
        taken += share.numel
    return taken


def _arriving(
    works: Sequence[TimedWork],
    shares: Sequence[Sequence[Share[OwnerBucket]]],
    pieces: Iterable[torch.Tensor],
    *buffers: torch.Tensor,
) -> Arriving:
    """``pieces`` bring ``shares``, which are written when they have come."""

    def write() -> list[torch.Tensor]:
        for of_sender, values in zip(shares, pieces, strict=True):
            taken = 0
            for share in of_sender:
                share.bucket.write(share.start, values[taken : taken + share.numel])
                taken += share.numel
        return []

    return Arriving(works, write, sum(map(_nbytes, buffers)))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
