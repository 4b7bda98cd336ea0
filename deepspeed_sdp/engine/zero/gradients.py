"""The way of a gradient, from autograd to this rank's shard of the average over its owners.

=========================== ============================================================================================
:meth:`GradientPath.add`    a micro-batch's gradient is in ``grad``: it is added to those before, in ``accumulate``
:meth:`GradientPath.ready`  the parameter's gradient is whole: rounds that are complete are launched, in the total order
``_launch_next``            of a round, every bucket is laid flat in ``reduce`` and sent to be averaged
``_note_norms``             notes the norm of each gradient, which NaN and Inf spoil; they are free once they are flat
``_take``                   the averaged shard has arrived: it is added to :attr:`GradientPath.averages`
:meth:`GradientPath.finish` the backward pass is over: all that is left is launched and taken
=========================== ============================================================================================

Like DDP's reducer, with one difference: rounds are launched strictly in the total order of
:mod:`deepspeed_sdp.plan.segmentation`, which is what keeps ranks with different parameters from waiting for each other
in a circle.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.stages import Pending
from deepspeed_sdp.engine.comm.timing import named
from deepspeed_sdp.engine.comm.transport import Transport
from deepspeed_sdp.engine.zero.launches import Launches
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket

# Seconds for which a hook waits for the oldest of them. A user's own collective in another hook may be what the others
# wait for: so the hook goes on then, and its rounds stay behind until an earlier one has arrived.
_PATIENCE = 1.0


class GradientPath:
    """See the module.

    Args:
        rounds: this rank's buckets by round; empty where it owns nothing of a round.
        parameters: of the buckets, by their index there.
        transport: averages the buckets of a round.
        reduce: dtype of the collectives.
        accumulate: dtype in which the micro-batches of a step are summed; autograd would sum in that of the weights.
        is_eager: whether a round is launched as soon as it is complete, or by :meth:`launch_before` alone.
        untrained: parameters that get gradients but are in no bucket; the gradients are dropped.

    Attributes:
        averages: of each bucket, averaged gradients ``[shard_numel]``; the optimizer takes them out.
        reached: parameters that got a gradient since :meth:`clear`.
        is_half_way: whether gradients have come, or rounds been launched, since :meth:`finish`.
    """

    def __init__(
        self,
        rounds: Sequence[Sequence[OwnerBucket]],
        parameters: Mapping[int, nn.Parameter],
        transport: Transport,
        *,
        reduce: torch.dtype,
        accumulate: torch.dtype,
        is_eager: bool = True,
        untrained: Sequence[nn.Parameter] = (),
    ) -> None:
        self.parameters = parameters
        self.averages: dict[OwnerBucket, torch.Tensor] = {}
        self.reached: set[int] = set()
        self._rounds = tuple(tuple(buckets) for buckets in rounds)
        self._transport = transport
        self._reduce, self._accumulate = reduce, accumulate
        self._is_eager = is_eager
        self._untrained = tuple(untrained)
        self._launches = Launches([{index for b in of_round for index in b.items} for of_round in self._rounds])
        self._sums: dict[int, torch.Tensor] = {}
        self._norms: list[tuple[int, torch.Tensor]] = []
        self._in_flight: deque[tuple[tuple[OwnerBucket, ...], Pending]] = deque()
        self._failure: BaseException | None = None
        self._begin()

    @property
    def buckets(self) -> list[OwnerBucket]:
        """This rank's, in the total order."""
        return [bucket for of_round in self._rounds for bucket in of_round]

    def _begin(self) -> None:
        self._launches.begin()
        self._is_patient = True
        self.is_half_way = False

    # -- this rank's own gradients -----------------------------------------------------------------------------------

    def add(self, index: int) -> None:
        """``grad`` of parameter ``index`` holds a micro-batch's gradient: add it to those before."""
        self.reached.add(index)
        parameter = self.parameters[index]
        if self._accumulate == parameter.dtype or parameter.grad is None:
            return  # autograd adds up in ``grad`` itself
        before = self._sums.get(index)
        gradient = parameter.grad.to(self._accumulate)
        self._sums[index] = gradient if before is None else before.add_(gradient)
        parameter.grad = None

    def ready(self, index: int) -> None:
        """Parameter ``index`` has its whole gradient: launch what is complete, in order."""
        self.check()
        self._launches.arrive(index)
        self.is_half_way = True
        end = self._launches.complete if self._is_eager else 0
        while self._launches.next < end and self._has_room():
            self._launch_next()

    # -- rounds under way --------------------------------------------------------------------------------------------

    def launch_before(self, round_: int) -> None:
        """Launch all rounds before ``round_``: the backward pass is past them, whatever it did not reach."""
        while self._launches.next < round_:
            self._launch_next()

    def finish(self) -> None:
        """Launch what is left, parameters without a gradient included, and take every result."""
        self.launch_before(len(self._launches))
        while self._in_flight:
            self._take()
        self._begin()

    def _has_room(self) -> bool:
        """Whether a round may be launched now, after a limited wait, which is not repeated before one has arrived."""
        while len(self._in_flight) >= self._launches.most:
            if not self._in_flight[0][1].arrives_within(_PATIENCE if self._is_patient else 0.0):
                self._is_patient = False
                return False
            self._take()
        return True

    def _launch_next(self) -> None:
        while len(self._in_flight) >= self._launches.most:
            self._take()
        buckets = self._rounds[self._launches.launch()]
        self.is_half_way = True
        with named("flatten gradients"):
            self._note_norms(buckets)
            flats = [self._flatten(bucket) for bucket in buckets]
        self._in_flight.append((buckets, self._transport.reduce(buckets, flats)))

    def _note_norms(self, buckets: Sequence[OwnerBucket]) -> None:
        """Of a round's gradients, all at once."""
        pieces = [(index, start, stop) for bucket in buckets for index, start, stop in bucket.ranges]
        found = [(index, self._gradient(index), start, stop) for index, start, stop in pieces]
        values = [(index, of.reshape(-1)[start:stop]) for index, of, start, stop in found if of is not None]
        if values:
            dtype = torch.promote_types(values[0][1].dtype, torch.float32)
            norms = torch._foreach_norm([value for _, value in values], dtype=dtype)
            self._norms += zip((index for index, _ in values), norms, strict=True)

    def _gradient(self, index: int) -> torch.Tensor | None:
        return self._sums.get(index, self.parameters[index].grad)

    def _flatten(self, bucket: OwnerBucket) -> torch.Tensor:
        """The gradients of ``bucket`` as one ``[padded_numel]`` tensor, zeros where the backward pass did not reach."""
        flat = torch.empty(bucket.padded_numel, dtype=self._reduce, device=bucket.device)
        places, values, taken = [], [], 0
        for index, start, stop in bucket.ranges:
            place, taken = flat[taken : taken + stop - start], taken + stop - start
            gradient = self._gradient(index)
            if gradient is None:
                place.zero_()
            else:
                places.append(place)
                values.append(gradient.reshape(-1)[start:stop])
            if self._launches.is_used_up(index):
                self._forget(index)
        flat[taken:].zero_()
        if values:
            torch._foreach_copy_(places, values)
        return flat

    def _take(self) -> None:
        buckets, pending = self._in_flight.popleft()
        self._is_patient = True
        # Kept in the dtype in which micro-batches are summed, as by DeepSpeed: fp32 in transit costs no memory at rest.
        dtype = self._accumulate
        for bucket, shard in zip(buckets, pending.finish(), strict=True):
            before = self.averages.get(bucket)
            if before is not None:
                before += shard.to(dtype)
                continue
            is_view = shard.untyped_storage().nbytes() > shard.numel() * shard.element_size()
            self.averages[bucket] = shard.to(dtype, copy=is_view)

    # -- what went wrong ---------------------------------------------------------------------------------------------

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

    def first_nonfinite(self) -> tuple[int, float] | None:
        """The first parameter in backward order whose own gradient is not finite, and its norm."""
        norms = torch.stack([norm for _, norm in self._norms]).tolist() if self._norms else []
        found = zip((index for index, _ in self._norms), norms, strict=True)
        return next(((index, norm) for index, norm in found if not math.isfinite(norm)), None)

    # -- the gradients are used up -----------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop every gradient, averaged ones included."""
        for parameter in (*self.parameters.values(), *self._untrained):
            parameter.grad = None
        self._sums.clear()
        self._norms.clear()
        self.averages.clear()
        self.reached.clear()

    def _forget(self, index: int) -> None:
        self.parameters[index].grad = None
        self._sums.pop(index, None)

    def tensors(self) -> list[torch.Tensor]:
        """What holds gradients beside ``grad`` of the parameters and the buffers under way."""
        return [*self._sums.values(), *self.averages.values()]

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the buffers under way now."""
        return sum(pending.nbytes for _, pending in self._in_flight)
