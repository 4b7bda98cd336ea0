"""Averages gradients over their owners while the backward pass runs.

Like DDP's reducer, with one difference: rounds are launched strictly in the total order of
:mod:`deepspeed_sdp.plan.segmentation`, which is what keeps ranks with different parameters from waiting for each other
in a circle.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from deepspeed_sdp.engine.comm.transport import Pending, Transport
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket

# Rounds under way at a time: flat copies of gradients alive beyond the gradients themselves.
_MAX_IN_FLIGHT = 2


class Reducer:
    """Decides when a round is launched and when its result is taken.

    Args:
        rounds: this rank's buckets by round; empty where it owns nothing of a round.
        transport: moves them.
        flatten: gives the gradients of a bucket as one tensor ``[padded_numel]``, zeros where the backward pass did not
            reach; a gradient is free after the bucket with its last element.
        keep: takes the averaged shard ``[shard_numel]`` of a bucket.
        is_eager: whether a round is launched as soon as it is complete, or by :meth:`launch_before` alone.

    Attributes:
        is_half_way: whether gradients have come, or rounds been launched, since :meth:`finish`.
    """

    def __init__(
        self,
        rounds: Sequence[Sequence[OwnerBucket]],
        transport: Transport,
        flatten: Callable[[OwnerBucket], torch.Tensor],
        keep: Callable[[OwnerBucket, torch.Tensor], None],
        is_eager: bool = True,
    ) -> None:
        self._is_eager = is_eager
        self._rounds = tuple(tuple(buckets) for buckets in rounds)
        self._transport = transport
        self._flatten = flatten
        self._keep = keep
        # Several, in ascending order, of a parameter that is cut.
        self._rounds_of: dict[int, list[int]] = {}
        for round_, buckets in enumerate(self._rounds):
            for flat in buckets:
                for index in flat.bucket.items:
                    self._rounds_of.setdefault(index, []).append(round_)
        self._in_flight: deque[tuple[tuple[OwnerBucket, ...], Pending]] = deque()
        self._failure: BaseException | None = None
        self._reset()

    def _reset(self) -> None:
        self._waiting = [{index for flat in buckets for index in flat.bucket.items} for buckets in self._rounds]
        self._next = 0
        self.is_half_way = False

    def ready(self, index: int) -> None:
        """Parameter ``index`` has its whole gradient: launch what is complete, in order."""
        self.check()
        rounds = self._rounds_of[index]
        if index not in self._waiting[rounds[0]]:
            raise RuntimeError(f"gradient {index} came twice in one backward pass; it may have been reduced already")
        for round_ in rounds:
            self._waiting[round_].remove(index)
        self.is_half_way = True
        if self._is_eager:
            self.launch_before(self._complete())

    def _complete(self) -> int:
        """The first round that must wait: after it come incomplete rounds, or ones that this rank owns nothing of.

        The latter are always complete. But taking part in them early could mean to wait for ranks that still need
        something of this one (at ZeRO-3 a gather) to come so far in their backward pass.
        """
        end = self._next
        for round_ in range(self._next, len(self._rounds)):
            if self._waiting[round_]:
                break
            if self._rounds[round_]:
                end = round_ + 1
        return end

    def launch_before(self, round_: int) -> None:
        """Launch all rounds before ``round_``: the backward pass is past them, whatever it did not reach."""
        while self._next < round_:
            self._launch_next()

    def finish(self) -> None:
        """Launch what is left, parameters without a gradient included, and take every result."""
        self.launch_before(len(self._rounds))
        while self._in_flight:
            self._take()
        self._reset()

    def check(self) -> None:
        """Raise a RuntimeError if an earlier backward pass failed."""
        if self._failure is not None:
            raise RuntimeError(
                f"an earlier backward pass failed ({type(self._failure).__name__}: {self._failure}) with gradients "
                "half reduced; this engine cannot train on"
            )

    def fail(self, error: BaseException) -> None:
        """A backward pass ended early. Waiting for what is under way could last for ever: other ranks may be gone."""
        self._failure = self._failure or error

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the buffers under way now."""
        return sum(pending.nbytes for _, pending in self._in_flight)

    def _launch_next(self) -> None:
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._take()
        buckets = self._rounds[self._next]
        self._waiting[self._next].clear()
        self._next += 1
        self.is_half_way = True
        grads = [self._flatten(flat) for flat in buckets]
        self._in_flight.append((buckets, self._transport.reduce(buckets, grads)))

    def _take(self) -> None:
        buckets, pending = self._in_flight.popleft()
        for flat, shard in zip(buckets, pending.finish(), strict=True):
            self._keep(flat, shard)
