"""Averages gradients over their owners while the backward pass runs.

Like DDP's reducer, with two differences: every bucket has a process group of its own, and buckets are launched strictly
in the total order of :mod:`deepspeed_sdp.engine.buckets`, which is what keeps ranks with different parameters from
waiting for each other in a circle.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.buckets import Bucket
from deepspeed_sdp.engine.groups import OwnerGroups
from deepspeed_sdp.engine.traffic import Traffic, all_reduce_bytes

# Flat copies of gradients alive at a time, beyond the gradients themselves.
_MAX_IN_FLIGHT = 2


class InFlight(NamedTuple):
    """A launched all-reduce and what must stay alive until it is done."""

    bucket: Bucket
    flat: torch.Tensor
    work: "dist.Work | None"


def launch_all_reduce(
    grads: Sequence[torch.Tensor], bucket: Bucket, groups: OwnerGroups, dtype: torch.dtype, traffic: Traffic
) -> InFlight:
    """Start averaging ``grads`` (any shapes, one dtype) over the owners of ``bucket``.

    Returns the flat average ``[sum(bucket.numels)]`` of ``dtype`` once ``work`` is done; ``work`` is ``None`` where one
    rank owns the bucket alone.
    """
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    group = groups.group(bucket.owner_set)
    ranks = len(groups.ranks(bucket.owner_set))
    if ranks == 1:
        return InFlight(bucket, flat, None)
    # Divided before the sum, as DeepSpeed does, so that low precision does not overflow.
    flat = flat.div_(ranks).to(dtype)
    traffic.add("gradient_all_reduce", all_reduce_bytes(flat.numel() * flat.element_size(), ranks))
    return InFlight(bucket, flat, dist.all_reduce(flat, group=group, async_op=True))


class Reducer:
    """Decides when a bucket is launched and when its result is taken.

    Args:
        buckets: this rank's buckets, in the total order.
        groups: process groups of the owner sets.
        gradient: gradient of parameter ``index``, zeros if the backward pass did not reach it.
        consume: takes the averaged flat piece of parameter ``index``; the gradient itself is free after that.
        dtype: dtype of the collectives.
        traffic: counts the bytes.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        groups: OwnerGroups,
        gradient: Callable[[int], torch.Tensor],
        consume: Callable[[int, torch.Tensor], None],
        dtype: torch.dtype,
        traffic: Traffic,
    ) -> None:
        self.buckets = tuple(buckets)
        self._groups = groups
        self._gradient = gradient
        self._consume = consume
        self._dtype = dtype
        self._traffic = traffic
        self._bucket_of = {index: i for i, bucket in enumerate(self.buckets) for index in bucket.items}
        self._in_flight: deque[InFlight] = deque()
        self._reset()

    def _reset(self) -> None:
        self._waiting = [set(bucket.items) for bucket in self.buckets]
        self._next = 0

    def ready(self, index: int) -> None:
        """Parameter ``index`` has its whole gradient: launch what is complete, in order."""
        waiting = self._waiting[self._bucket_of[index]]
        if index not in waiting:
            raise RuntimeError(f"gradient {index} came twice in one backward pass; it may have been reduced already")
        waiting.remove(index)
        while self._next < len(self.buckets) and not self._waiting[self._next]:
            self._launch_next()

    def finish(self) -> None:
        """Launch what is left, parameters without a gradient included, and take every result."""
        while self._next < len(self.buckets):
            self._launch_next()
        while self._in_flight:
            self._take()
        self._reset()

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the flat copies alive now."""
        return sum(entry.flat.numel() * entry.flat.element_size() for entry in self._in_flight)

    def _launch_next(self) -> None:
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._take()
        bucket = self.buckets[self._next]
        self._next += 1
        grads = [self._gradient(index) for index in bucket.items]
        self._in_flight.append(launch_all_reduce(grads, bucket, self._groups, self._dtype, self._traffic))

    def _take(self) -> None:
        entry = self._in_flight.popleft()
        if entry.work is not None:
            entry.work.wait()
        pieces = torch.split(entry.flat, list(entry.bucket.numels))
        for index, piece in zip(entry.bucket.items, pieces, strict=True):
            self._consume(index, piece)
