"""Backward masking: updated weights on their way from their owners to every rank, which all compute with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.groups import Group
from deepspeed_sdp.engine.comm.timing import Stopwatch, named
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import Pending, start_all_gather
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket

KIND = "weight_refresh"

# Of the volume: how much padding an all-gather, which takes equal pieces, may cost instead of an all-to-all.
_PADDING = 0.05


@dataclass(frozen=True)
class Share:
    """Elements ``[start, stop)`` of a bucket's flat vector, as one owner sends them."""

    bucket: OwnerBucket
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements of it."""
        return self.stop - self.start


@dataclass(frozen=True)
class Route:
    """Who sends what of some buckets to whom; worked out once.

    Attributes:
        sent: the shares that this rank sends.
        receivers: for each of them, the ranks that lack it, ascending.
        received: by sender, the shares that this rank lacks.
        all_gather_numel: elements of every rank's piece, where one all-gather serves; else 0.
    """

    sent: tuple[Share, ...]
    receivers: tuple[tuple[int, ...], ...]
    received: tuple[tuple[Share, ...], ...]
    all_gather_numel: int


class Exchange:
    """Moves the weights of many buckets at once, over the world.

    Every owner of a bucket sends an equal share of it, so none sends more than the others, and every rank receives each
    element that it lacks once: at ZeRO 0 what it does not own, at ZeRO 1 and 2, where a step updates one shard, all
    other shards too. One message for each call, whatever the number of buckets.

    Args:
        group: of the whole world; all ranks issue what runs on it in the same order.
        is_sharded: see :class:`OwnerBucket`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        group: Group,
        is_sharded: bool,
        device: torch.device,
        dtype: torch.dtype,
        traffic: Traffic,
        stopwatch: Stopwatch,
    ) -> None:
        self._group = group
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._is_sharded = is_sharded
        self._device, self._dtype = device, dtype
        self._traffic = traffic
        self._stopwatch = stopwatch

    def route(self, buckets: Sequence[OwnerBucket]) -> Route:
        """How ``buckets`` travel; the same on all ranks, whether they own them or not."""
        shares = {
            rank: [Share(b, *b.share_of(rank)) for b in buckets if rank in b.ranks] for rank in range(self._world)
        }
        totals = [sum(share.numel for share in of_rank) for of_rank in shares.values()]
        is_even = self._world * max(totals) <= (1 + _PADDING) * sum(totals)
        sent = tuple(shares[self._rank])
        return Route(
            sent,
            tuple(tuple(r for r in range(self._world) if self._lacks(s.bucket, r, self._rank)) for s in sent),
            tuple(
                tuple(share for share in of_rank if self._lacks(share.bucket, self._rank, sender))
                for sender, of_rank in shares.items()
            ),
            max(totals) if self._is_sharded and is_even else 0,
        )

    @named("refresh weights")
    def start(self, route: Route) -> Pending:
        """Collective. Send this rank's shares; ``finish`` of the result writes what came from others."""
        for share, receivers in zip(route.sent, route.receivers, strict=True):
            self._count(share.numel * len(receivers), share.bucket.owner_set)
        return self._all_gather(route) if route.all_gather_numel else self._all_to_all(route)

    def _all_gather(self, route: Route) -> Pending:
        numel = route.all_gather_numel
        send = torch.empty(numel, dtype=self._dtype, device=self._device)
        taken = 0
        for share in route.sent:
            send[taken : taken + share.numel] = share.bucket.read(share.start, share.stop)
            taken += share.numel
        self._count((numel - taken) * (self._world - 1))
        received = torch.empty(self._world * numel, dtype=self._dtype, device=self._device)
        work = start_all_gather(received, send, self._group)
        pieces = torch.split(received, numel)
        return self._pending(work, route, pieces, _nbytes(received) + _nbytes(send))

    def _all_to_all(self, route: Route) -> Pending:
        pieces: list[list[torch.Tensor]] = [[] for _ in range(self._world)]
        for share, receivers in zip(route.sent, route.receivers, strict=True):
            value = share.bucket.read(share.start, share.stop)
            for rank in receivers:
                pieces[rank].append(value)
        sizes = [sum(map(len, of_rank)) for of_rank in pieces]
        sent = [piece for of_rank in pieces for piece in of_rank]
        send = torch.cat(sent) if sent else torch.empty(0, dtype=self._dtype, device=self._device)
        expected = [sum(share.numel for share in of_rank) for of_rank in route.received]
        received = torch.empty(sum(expected), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(received, send, expected, sizes, group=self._group.handle, async_op=True)
        result = torch.split(received, expected)
        return self._pending(work, route, result, _nbytes(received) + _nbytes(send))

    def _pending(self, work: Any, route: Route, pieces: Sequence[torch.Tensor], nbytes: int) -> Pending:
        timed = self._stopwatch.timed(work, "refreshing weights", self._group)
        return Pending([timed], lambda: _write(route, pieces), nbytes)

    def _lacks(self, bucket: OwnerBucket, rank: int, sender: int) -> bool:
        return sender != rank and (self._is_sharded or rank not in bucket.ranks)

    def _count(self, numel: int, owner_set: int = 0) -> None:
        self._traffic.add(KIND, numel * self._dtype.itemsize, owner_set)


def _write(route: Route, pieces: Sequence[torch.Tensor]) -> None:
    for shares, values in zip(route.received, pieces, strict=True):
        taken = 0
        for share in shares:
            share.bucket.write(share.start, values[taken : taken + share.numel])
            taken += share.numel


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
