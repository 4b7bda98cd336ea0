"""How the buckets of a round cross the network: averaging gradients into shards, and gathering weights from them.

Two ways with the same results and, on backends that have a native reduce-scatter, the same volume
(docs/architecture.md has both side by side):

- :class:`OwnerSetTransport`: one collective per bucket, on the owners' process group;
- :class:`AllToAllTransport`: all buckets of a round in one ``all_to_all_single`` over the world, summed locally.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.groups import Group
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


def start_all_gather(output: torch.Tensor, shard: torch.Tensor, group: Group) -> Any:
    """The work that fills ``output`` ``[ranks * n]`` with the ``shard`` ``[n]`` of every rank."""
    return getattr(dist, _ALL_GATHER)(output, shard, group=group.handle, async_op=True)


class Pending:
    """Collectives under way. ``finish`` waits for them and gives their result; call it once.

    Attributes:
        nbytes: bytes of the buffers that live until then.
    """

    def __init__(self, works: Sequence[TimedWork], result: Callable[[], Any], nbytes: int) -> None:
        self.works = works
        self._result = result
        self.nbytes = nbytes

    def arrives_within(self, seconds: float) -> bool:
        """Block for about so long at most; whether :meth:`finish` will then not keep the host waiting."""
        return all(work.arrives_within(seconds) for work in self.works)

    def finish(self) -> Any:
        """The result; blocks until the collectives are done."""
        for work in self.works:
            work.wait()
        return self._result()


class Transport(Protocol):
    """Collective over the world: every rank calls it for the same rounds in the same order, with its own buckets."""

    def reduce(self, buckets: Sequence[OwnerBucket], grads: Sequence[torch.Tensor]) -> Pending:
        """Average ``grads`` (``[padded_numel]`` per bucket, may be overwritten) over the owners.

        The result is a list with this rank's averaged shard ``[shard_numel]`` of every bucket.
        """

    def gather(self, buckets: Sequence[FlatBucket], kind: str) -> Pending:
        """Fill ``flat`` of every bucket from the shards of its owners; ``kind`` names the traffic."""


class OwnerSetTransport:
    """One collective per bucket: all-reduce (ZeRO 0), or reduce-scatter and all-gather.

    gloo has no reduce-scatter of its own (torch builds it from an all-reduce), so it is an all-reduce there, and
    counted as one.
    """

    def __init__(self, traffic: Traffic, stopwatch: Stopwatch) -> None:
        self._traffic = traffic
        self._stopwatch = stopwatch

    @named("reduce gradients")
    def reduce(self, buckets: Sequence[OwnerBucket], grads: Sequence[torch.Tensor]) -> Pending:
        works, shards = [], []
        for bucket, flat in zip(buckets, grads, strict=True):
            work, shard = self._reduce_one(bucket, flat)
            works += work
            shards.append(shard)
        return Pending(works, lambda: shards, sum(map(_nbytes, grads)))

    def _reduce_one(self, bucket: OwnerBucket, flat: torch.Tensor) -> tuple[list[TimedWork], torch.Tensor]:
        owners = len(bucket.ranks)
        mine = flat.narrow(0, bucket.index * bucket.shard_numel, bucket.shard_numel)
        if owners == 1:
            return [], mine
        # Divided before the sum, so that low precision does not overflow.
        flat.div_(owners)
        if bucket.shards == 1 or bucket.group.backend == "gloo":
            self._count("gradient_all_reduce", all_reduce_bytes(_nbytes(flat), owners), bucket)
            work = dist.all_reduce(flat, group=bucket.group.handle, async_op=True)
            return [self._timed(work, _AVERAGING, bucket)], mine
        shard = torch.empty_like(mine)
        self._count("gradient_reduce_scatter", all_gather_bytes(_nbytes(flat), owners), bucket)
        work = getattr(dist, _REDUCE_SCATTER)(shard, flat, group=bucket.group.handle, async_op=True)
        return [self._timed(work, _AVERAGING, bucket)], shard

    @named("gather weights")
    def gather(self, buckets: Sequence[FlatBucket], kind: str) -> Pending:
        works = []
        for bucket in buckets:
            shard = bucket.shard.to(bucket.flat.device, non_blocking=True)
            if bucket.shards == 1:
                if bucket.shard.data_ptr() != bucket.flat.data_ptr():
                    bucket.flat.copy_(shard)
                continue
            self._count(kind, all_gather_bytes(_nbytes(bucket.flat), bucket.shards), bucket)
            work = start_all_gather(bucket.flat, shard, bucket.group)
            works.append(self._timed(work, _GATHERING, bucket))
        return Pending(works, lambda: None, 0)

    def _count(self, kind: str, nbytes: int, bucket: OwnerBucket) -> None:
        self._traffic.add(kind, nbytes, bucket.owner_set)

    def _timed(self, work: Any, what: str, bucket: OwnerBucket) -> TimedWork:
        return self._stopwatch.timed(work, what, bucket.group)


class AllToAllTransport:
    """All buckets of a round in one ``all_to_all_single``; a rank without a bucket in it takes part with nothing.

    Every shard is summed by the one rank that keeps it, in the order of the ranks and in fp32 at least: the result
    depends on nothing but the gradients.

    Args:
        group: of the whole world.
        device, dtype: of what is sent by a rank that has nothing to send.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        traffic: Traffic,
        stopwatch: Stopwatch,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._group = group
        self._world = len(group.ranks)
        self._rank = dist.get_rank()
        self._traffic = traffic
        self._stopwatch = stopwatch

    @named("reduce gradients")
    def reduce(self, buckets: Sequence[OwnerBucket], grads: Sequence[torch.Tensor]) -> Pending:
        pieces: list[list[torch.Tensor]] = [[] for _ in range(self._world)]
        for bucket, flat in zip(buckets, grads, strict=True):
            for rank, piece in zip(bucket.ranks, torch.split(flat, bucket.shard_numel), strict=True):
                pieces[rank].append(piece)
            self._count("gradient_all_to_all", bucket, flat.element_size())
        # The shards of one bucket lie in the order of its ranks.
        work, received, sizes = self._exchange(_AVERAGING, pieces, grads[0] if len(grads) == 1 else None)

        # It holds what was received, and nothing of what was sent.
        def result() -> list[torch.Tensor]:
            by_rank = torch.split(received, sizes)
            taken = [0] * self._world
            shards = []
            for bucket in buckets:
                total = torch.zeros(bucket.shard_numel, dtype=_sum_dtype(received.dtype), device=received.device)
                for rank in bucket.ranks:
                    total += by_rank[rank].narrow(0, taken[rank], bucket.shard_numel)
                    taken[rank] += bucket.shard_numel
                shards.append(total.div_(len(bucket.ranks)))
            return shards

        return Pending(work, result, 2 * _nbytes(received))

    @named("gather weights")
    def gather(self, buckets: Sequence[FlatBucket], kind: str) -> Pending:
        pieces: list[list[torch.Tensor]] = [[] for _ in range(self._world)]
        shards = [bucket.shard.to(bucket.flat.device, non_blocking=True) for bucket in buckets]
        for bucket, shard in zip(buckets, shards, strict=True):
            for rank in bucket.ranks:
                if rank != self._rank:
                    pieces[rank].append(shard)
            self._count(kind, bucket, shard.element_size())
        work, received, sizes = self._exchange(_GATHERING, pieces)

        def result() -> None:
            by_rank = torch.split(received, sizes)
            taken = [0] * self._world
            for bucket, shard in zip(buckets, shards, strict=True):
                for rank, piece in zip(bucket.ranks, torch.split(bucket.flat, bucket.shard_numel), strict=True):
                    if rank != self._rank:
                        piece.copy_(by_rank[rank].narrow(0, taken[rank], bucket.shard_numel))
                        taken[rank] += bucket.shard_numel
                    elif piece.data_ptr() != shard.data_ptr():
                        piece.copy_(shard)

        return Pending(work, result, 2 * _nbytes(received))

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
        received = torch.empty_like(send)
        work = dist.all_to_all_single(received, send, sizes, sizes, group=self._group.handle, async_op=True)
        return [self._stopwatch.timed(work, what, self._group)], received, sizes

    def _count(self, kind: str, bucket: OwnerBucket, element_size: int) -> None:
        nbytes = (bucket.shards - 1) * bucket.shard_numel * element_size
        self._traffic.add(kind, nbytes, bucket.owner_set)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
