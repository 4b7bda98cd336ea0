"""After a step: updated weights on their way to every rank that computes with them.

The model falls into *portions*, ranges of rounds, in forward order. A portion leaves as soon as its shards are stepped,
while the next one is being stepped. Under backward masking what is still under way after the last one can go on beside
the next forward pass, which waits for a portion where it first needs one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.comm.exchange import Exchange
from deepspeed_sdp.engine.comm.stages import Pending
from deepspeed_sdp.engine.comm.transport import Transport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket

# Portions that may be under way whatever they take.
_MIN_IN_FLIGHT = 2


@dataclass(frozen=True)
class Portion:
    """What is stepped, and then travels, together; the same rounds on all ranks.

    Attributes:
        rounds: indices of its rounds, ascending.
        owned: this rank's buckets in them, by round.
        gathered: this rank's buckets that the owners gather among themselves.
        exchanged: buckets that go to all ranks, those of others included; the same on all ranks.
    """

    rounds: range
    owned: tuple[tuple[OwnerBucket, ...], ...]
    gathered: tuple[FlatBucket, ...]
    exchanged: tuple[OwnerBucket, ...]


class WeightRefresh:
    """Issues portions in order and takes their results.

    Args:
        portions: in forward order.
        transport: for gathers among owners.
        is_gathered: whether owners gather at all (ZeRO 1 and 2); then all ranks take part in every portion, for a
            transport may be one collective over the world.
        exchange: for backward masking, else ``None``.
        budget: bytes of buffers that may be under way beyond two portions.
        is_lazy: whether the last portions may be under way when the step is over.
    """

    def __init__(
        self,
        portions: Sequence[Portion],
        transport: Transport,
        is_gathered: bool,
        exchange: Exchange | None,
        budget: int = 0,
        is_lazy: bool = False,
    ) -> None:
        self.portions = tuple(portions)
        self._transport = transport
        self._is_gathered = is_gathered
        self._exchange = exchange
        self._routes = [exchange.route(p.exchanged) if p.exchanged else None for p in portions] if exchange else []
        self._budget = budget
        self._is_lazy = is_lazy
        self._under_way: deque[tuple[int, list[Pending]]] = deque()
        self._failure: BaseException | None = None
        self._hooks: list[Any] = []

    def issue(self, index: int) -> None:
        """Collective. Portion ``index`` is stepped: send it."""
        while len(self._under_way) >= _MIN_IN_FLIGHT and self.in_flight_bytes >= self._budget:
            self._finish_next()
        pending = []
        if self._is_gathered:
            pending.append(self._transport.gather(self.portions[index].gathered, "weight_gather"))
        route = self._routes[index] if self._routes else None
        if self._exchange is not None and route is not None:
            pending.append(self._exchange.start(route))
        self._under_way.append((index, pending))
        if not self._is_lazy and index == len(self.portions) - 1:
            self.settle()

    def send_all(self) -> None:
        """Collective. Send every portion as it is, and wait for all of them."""
        for index in range(len(self.portions)):
            self.issue(index)
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

        self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def settle_before_state_dict(self, model: nn.Module) -> None:
        """Have ``state_dict`` of ``model`` and of every module in it wait for all portions."""
        for module in model.modules():
            hook = module.register_state_dict_pre_hook(lambda *_: self.settle())  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def close(self) -> None:
        """Take the hooks off; waits for what is under way, but after a failure, when it may never come."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            if self._failure is None:
                self.settle()
        finally:
            self._under_way.clear()

    def fail(self, error: BaseException) -> None:
        """Other ranks may be gone: wait for nothing any more."""
        self._failure = self._failure or error

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the buffers under way now."""
        return sum(pending.nbytes for _, of_portion in self._under_way for pending in of_portion)

    @torch.no_grad()
    def _finish_next(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"weights are not those of the last step: {type(self._failure).__name__}: {self._failure}"
            )
        try:
            for pending in self._under_way[0][1]:
                pending.finish()
        except BaseException as error:
            self.fail(error)
            raise
        self._under_way.popleft()
