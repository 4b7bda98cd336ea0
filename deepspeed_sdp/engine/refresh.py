"""After a step: updated weights on their way to every rank that computes with them.

The model falls into *portions*, ranges of rounds, in forward order. A portion leaves as soon as its shards are stepped,
while the next one is being stepped. Under backward masking what is still under way after the last one goes on beside
the next forward pass, which waits for a portion where it first needs one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.exchange import Exchange
from deepspeed_sdp.engine.flat_bucket import FlatBucket
from deepspeed_sdp.engine.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.transport import Pending, Transport

# Portions that may be under way whatever they take.
_MIN_IN_FLIGHT = 2


@dataclass(frozen=True)
class Portion:
    """What is stepped, and then travels, together; the same rounds on all ranks.

    Attributes:
        rounds: indices of its rounds, ascending.
        owned: this rank's buckets in them, by round.
        gathered: buckets that the owners gather among themselves.
        exchanged: buckets that go to all ranks, those of others included.
    """

    rounds: tuple[int, ...]
    owned: tuple[tuple[OwnerBucket, ...], ...]
    gathered: tuple[FlatBucket, ...]
    exchanged: tuple[OwnerBucket, ...]


class WeightRefresh:
    """Issues portions in order and takes their results.

    Args:
        portions: in forward order.
        transport: for gathers among owners.
        exchange: for backward masking, else ``None``.
        budget: bytes of buffers that may be under way beyond two portions. Gradients are gone when weights travel: as
            long as it is no more than those took, the peak of a step does not grow.
    """

    def __init__(
        self, portions: Sequence[Portion], transport: Transport, exchange: Exchange | None, budget: int
    ) -> None:
        self.portions = tuple(portions)
        self._transport = transport
        self._exchange = exchange
        self._budget = budget
        self._under_way: deque[tuple[int, list[Pending]]] = deque()

    def issue(self, index: int) -> None:
        """Collective. Portion ``index`` is stepped: send it."""
        while len(self._under_way) >= _MIN_IN_FLIGHT and self.in_flight_bytes >= self._budget:
            self._finish_next()
        portion = self.portions[index]
        pending = []
        if portion.gathered:
            pending.append(self._transport.gather(portion.gathered, "weight_gather"))
        if self._exchange is not None and portion.exchanged:
            pending.append(self._exchange.start(portion.exchanged))
        self._under_way.append((index, pending))
        if self._exchange is None and index == len(self.portions) - 1:
            self.settle()

    def settle(self, through: int | None = None) -> None:
        """Wait for the portions up to ``through``, or for all: their weights are those of the last step."""
        while self._under_way and (through is None or self._under_way[0][0] <= through):
            self._finish_next()

    def settle_before(self, module: nn.Module, through: int) -> None:
        """Have ``module``'s forward pass wait for the portions up to ``through``."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(*_: Any) -> None:
            self.settle(through)

        module.register_forward_pre_hook(hook, prepend=True)

    def close(self) -> None:
        """Let go of process groups, after what is under way."""
        self.settle()
        self._transport.close()
        if self._exchange is not None:
            self._exchange.close()

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the buffers under way now."""
        return sum(pending.nbytes for _, of_portion in self._under_way for pending in of_portion)

    @torch.no_grad()
    def _finish_next(self) -> None:
        _, of_portion = self._under_way.popleft()
        for pending in of_portion:
            pending.finish()
