"""Backward masking: updated weights on their way from their owners to every rank, which all compute with them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed_sdp.engine.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.stopwatch import Stopwatch
from deepspeed_sdp.engine.traffic import Traffic
from deepspeed_sdp.engine.transport import Pending

KIND = "weight_refresh"

# Of the volume: how much padding an all-gather, which takes equal pieces, may cost instead of an all-to-all.
_PADDING = 0.05


class Exchange:
    """Moves the weights of many buckets at once, over the world.

    Every owner of a bucket sends an equal share of it, so none sends more than the others, and every rank receives each
    element that it lacks once: at ZeRO 0 what it does not own, at ZeRO 1 and 2, where a step updates one shard, all
    other shards too. One message for each call, whatever the number of buckets.

    Args:
        process_group: of the whole world; nothing else uses it while an exchange is under way.
        is_sharded: see :class:`OwnerBucket`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        process_group: ProcessGroup,
        is_sharded: bool,
        device: torch.device,
        dtype: torch.dtype,
        traffic: Traffic,
        stopwatch: Stopwatch,
    ) -> None:
        self._group: ProcessGroup | None = process_group
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._is_sharded = is_sharded
        self._device, self._dtype = device, dtype
        self._traffic = traffic
        self._stopwatch = stopwatch

    def start(self, buckets: Sequence[OwnerBucket]) -> Pending:
        """Collective. Send this rank's share of each bucket; ``finish`` of the result writes what came from others.

        Args:
            buckets: the same on all ranks, whether they own them or not.
        """
        totals = [self._total(buckets, rank) for rank in range(self._world)]
        padded = self._world * max(totals)
        if self._is_sharded and padded <= (1 + _PADDING) * sum(totals):
            return self._all_gather(buckets, max(totals))
        return self._all_to_all(buckets)

    def close(self) -> None:
        """Let go of the process group."""
        self._group = None

    def _all_gather(self, buckets: Sequence[OwnerBucket], numel: int) -> Pending:
        send = torch.empty(numel, dtype=self._dtype, device=self._device)
        taken = 0
        for bucket in buckets:
            if bucket.is_owned:
                share = bucket.read(*bucket.share_of(self._rank))
                send[taken : taken + len(share)] = share
                taken += len(share)
                self._count(bucket, len(share), self._world - 1)
        self._traffic.add(KIND, (numel - taken) * (self._world - 1) * self._dtype.itemsize)
        received = torch.empty(self._world * numel, dtype=self._dtype, device=self._device)
        work = dist.all_gather_into_tensor(received, send, group=self._group, async_op=True)

        def result() -> None:
            for rank in range(self._world):
                self._write(buckets, rank, received[rank * numel : (rank + 1) * numel])

        return Pending([self._stopwatch.timed(work)], result, _nbytes(received) + _nbytes(send))

    def _all_to_all(self, buckets: Sequence[OwnerBucket]) -> Pending:
        pieces: list[list[torch.Tensor]] = [[] for _ in range(self._world)]
        for bucket in buckets:
            if bucket.is_owned:
                share = bucket.read(*bucket.share_of(self._rank))
                receivers = [rank for rank in range(self._world) if self._receives(bucket, rank, self._rank)]
                for rank in receivers:
                    pieces[rank].append(share)
                self._count(bucket, len(share), len(receivers))
        sizes = [sum(map(len, of_rank)) for of_rank in pieces]
        sent = [piece for of_rank in pieces for piece in of_rank]
        send = torch.cat(sent) if sent else torch.empty(0, dtype=self._dtype, device=self._device)
        expected = [
            sum(_length(bucket, rank) for bucket in buckets if self._receives(bucket, self._rank, rank))
            for rank in range(self._world)
        ]
        received = torch.empty(sum(expected), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(received, send, expected, sizes, group=self._group, async_op=True)

        def result() -> None:
            for rank, values in enumerate(torch.split(received, expected)):
                self._write(buckets, rank, values)

        return Pending([self._stopwatch.timed(work)], result, _nbytes(received) + _nbytes(send))

    def _write(self, buckets: Sequence[OwnerBucket], sender: int, values: torch.Tensor) -> None:
        taken = 0
        for bucket in buckets:
            if self._receives(bucket, self._rank, sender):
                start, stop = bucket.share_of(sender)
                bucket.write(start, values[taken : taken + stop - start])
                taken += stop - start

    def _receives(self, bucket: OwnerBucket, rank: int, sender: int) -> bool:
        if sender not in bucket.ranks or sender == rank:
            return False
        return self._is_sharded or rank not in bucket.ranks

    def _total(self, buckets: Sequence[OwnerBucket], rank: int) -> int:
        return sum(_length(bucket, rank) for bucket in buckets if rank in bucket.ranks)

    def _count(self, bucket: OwnerBucket, numel: int, receivers: int) -> None:
        self._traffic.add(KIND, numel * receivers * self._dtype.itemsize, bucket.bucket.owner_set)


def _length(bucket: OwnerBucket, rank: int) -> int:
    start, stop = bucket.share_of(rank)
    return stop - start


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
