"""Bytes of what is on its way: buffers as ``engine/comm`` makes them, and what a rank sends."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_sdp.engine.comm.exchange import route_of, slice_numel
from deepspeed_sdp.engine.comm.traffic import all_gather_bytes, all_reduce_bytes
from deepspeed_sdp.engine.comm.transport import gathered_inside, resolve_transport, sum_dtype
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.estimate.buckets import Layout
from deepspeed_sdp.estimate.job import Job


@dataclass(frozen=True)
class Moved:
    """Buckets on their way.

    Attributes:
        sent: bytes that this rank sends.
        buffers: bytes that live until they have arrived, and the engine counts when it bounds what is under way.
        copied: bytes that live as long and are gloo's own: it gathers into a tensor of its own.
        passing: bytes that live for a moment besides, when they leave.
    """

    sent: int = 0
    buffers: int = 0
    copied: int = 0
    passing: int = 0


class Wire:
    """Moves the buckets of ``layout`` in numbers."""

    def __init__(self, job: Job, layout: Layout) -> None:
        assert job.sdp is not None
        asked = job.sdp.comm.transport
        self._is_gloo = job.backend == "gloo"
        self._width, self._reduced = job.dtype.itemsize, job.reduce_dtype.itemsize
        self._everyone, self._levels = layout.everyone, layout.levels
        self._is_sharded = job.stage > 0
        is_apart = job.sdp.schedule.is_apart
        self._kinds = 1 + job.moments * job.sdp.schedule.moments_sync
        self._is_updated = job.sdp.schedule.outer_optimizer is not None
        self._sums_itself = (
            not is_apart and resolve_transport(asked, job.backend, job.stage, "gradients") == "all_to_all"
        )
        self._gathers_at_once = (
            not is_apart and resolve_transport(asked, job.backend, job.stage, "weights") == "all_to_all"
        )
        # Averages as they arrive.
        self.average_dtype = sum_dtype(job.reduce_dtype) if self._sums_itself else job.reduce_dtype

    # -- gradients ---------------------------------------------------------------------------------------------------

    def reduce(self, buckets: Sequence[BucketShape]) -> Moved:
        """A round; its flat gradients live besides."""
        flat = sum(bucket.padded_numel for bucket in buckets) * self._reduced
        if self._sums_itself:
            # What is received is as large; several buckets are put together before.
            sent = sum((bucket.shards - 1) * bucket.shard_numel for bucket in buckets) * self._reduced
            return Moved(sent, flat, passing=flat * (2 if len(buckets) > 1 else 1))
        return Moved(sum(map(self._averaged, buckets)), sum(map(self._scattered, buckets)) * self._reduced)

    def _averaged(self, bucket: BucketShape) -> int:
        sharers = bucket.owners.sharers
        nbytes, ranks, replicas = bucket.padded_numel * self._reduced, len(sharers.ranks), sharers.replicas
        if bucket.shards == 1:
            return all_reduce_bytes(nbytes, ranks)
        inside = all_gather_bytes(nbytes, replicas)
        outside = all_reduce_bytes if self._is_gloo else all_gather_bytes
        return inside + outside(nbytes // replicas, ranks // replicas)

    def _scattered(self, bucket: BucketShape) -> int:
        """Elements of what each level leaves of a bucket; inside gloo receives all of it."""
        replicas, numel = bucket.owners.replicas, bucket.padded_numel
        if self._is_gloo:
            return numel if replicas > 1 else 0
        rings = [*self._levels, len(bucket.owners.sharers.ranks) // replicas]
        found = []
        for ring in (ring for ring in rings if ring > 1):
            numel //= ring
            found.append(numel)
        # A bucket that is whole everywhere is all-reduced at the last level.
        return sum(found if bucket.shards > 1 else found[:-1])

    def summed(self, buckets: Sequence[BucketShape]) -> int:
        """Bytes of the sums that this rank makes of what it received."""
        numel = sum(bucket.shard_numel for bucket in buckets)
        return numel * self.average_dtype.itemsize if self._sums_itself else 0

    def has_own_memory(self, bucket: BucketShape) -> bool:
        """Whether the average of ``bucket`` that arrives is a tensor of its own, and not a view."""
        is_scattered = not self._is_gloo and len(bucket.owners.sharers.ranks) > 1
        return self._sums_itself or bucket.shards == 1 or is_scattered

    # -- weights -----------------------------------------------------------------------------------------------------

    def gather(self, buckets: Sequence[BucketShape]) -> Moved:
        """Shards of this rank's buckets to their owners."""
        buckets = [bucket for bucket in buckets if bucket.shards > 1]
        padded = sum(bucket.padded_numel for bucket in buckets)
        sent = sum(all_gather_bytes(b.padded_numel * self._width, len(b.owners.sharers.ranks)) for b in buckets)
        if not self._gathers_at_once:
            return Moved(sent, copied=padded * self._width * self._is_gloo)
        if self._everyone.replicas > 1:
            return Moved(sent, gathered_inside(padded, self._levels) * self._width)
        return Moved(sent, 2 * (padded - sum(bucket.shard_numel for bucket in buckets)) * self._width)

    def exchange(self, buckets: Sequence[BucketShape]) -> Moved:
        """A portion's weights to all ranks (backward masking)."""
        if not buckets:
            return Moved()
        route, width = route_of(buckets, self._everyone, self._is_sharded), self._width
        send, received = route.buffers
        copied = received * width * self._is_gloo * bool(route.all_gather_numel)
        read = 0 if route.all_gather_numel else sum(share.numel for share in route.sent) * width
        outside = Moved(route.sent_numel * width, (send + received) * width, copied, read)
        replicas = self._everyone.replicas
        if replicas == 1:
            return outside
        # Then the slices inside; what came from outside lives until they leave.
        own = sum(map(slice_numel, route.inside))
        return Moved(
            outside.sent + own * (replicas - 1) * width,
            gathered_inside(own * replicas, self._levels) * width,
            own * replicas * width * self._is_gloo,
            outside.buffers + outside.copied + outside.passing,
        )

    # -- local steps -------------------------------------------------------------------------------------------------

    def agree(self, buckets: Sequence[BucketShape]) -> Moved:
        """Where workers train apart: owners average a portion's master weights, and perhaps moments."""
        owners = {bucket: len(bucket.owners.ranks) // bucket.owners.replicas for bucket in buckets}
        buckets = [bucket for bucket in buckets if owners[bucket] > 1 or self._is_updated]
        sent = 0
        for bucket in (bucket for bucket in buckets if owners[bucket] > 1):
            inside = 1 if self._is_sharded else bucket.owners.replicas
            nbytes = 4 * bucket.shard_numel
            once = all_reduce_bytes(nbytes, inside) + all_reduce_bytes(nbytes // inside, owners[bucket])
            sent += self._kinds * once
        # What is averaged and what comes of it; gloo receives as much besides.
        return Moved(
            sent,
            passing=max(1, self._kinds - 1) * (2 + self._is_gloo) * 4 * sum(bucket.shard_numel for bucket in buckets),
        )
