"""After a step: updated weights on their way to every rank that computes with them.

The model falls into *portions*, ranges of rounds, in forward order. A portion leaves as soon as its shards are stepped,
while the next one is being stepped. Under backward masking what is still under way after the last one can go on beside
the next forward pass, which waits for a portion where it first needs one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.exchange import Exchange
from deepspeed_sdp.engine.comm.stages import Pending
from deepspeed_sdp.engine.comm.transport import Transport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.zero.rounds import Portion


@dataclass(frozen=True)
class RefreshRules:
    """What travels after a step, and how much at a time. Pure; ``estimate/`` follows them too.

    Attributes:
        is_gathered: whether owners gather at all (ZeRO 1 and 2); then all ranks take part in every portion, for a
            transport may be one collective over the world.
        is_exchanged: whether weights go to all ranks (backward masking).
        is_lazy: whether the last portions may be under way when the step is over.
        budget: bytes of buffers that may be under way beyond the ``least`` portions.
        least: portions that may be under way whatever they take.
    """

    is_gathered: bool
    is_exchanged: bool
    is_lazy: bool
    budget: int
    least: int = 2

    @classmethod
    def of(cls, stage: int, is_exchanged: bool, sdp: SDPConfig, accumulate: torch.dtype, numel: int) -> "RefreshRules":
        """Of a job.

        Args:
            accumulate: dtype in which gradients wait.
            numel: elements of this rank's shards.
        """
        is_lazy = is_exchanged and sdp.backward.overlap_refresh
        # The averaged gradients are gone when weights travel: with no more than they took the peak does not grow.
        return cls(0 < stage < 3, is_exchanged, is_lazy, accumulate.itemsize * numel * is_lazy)

    def must_wait(self, portions: int, nbytes: int) -> bool:
        """Whether one more may not leave while so many are under way, with so many bytes of buffers."""
        return portions >= self.least and nbytes >= self.budget


class WeightRefresh:
    """Issues portions in order and takes their results.

    Args:
        portions: in forward order.
        rules: see there.
        transport: for gathers among owners.
        exchange: for backward masking, else ``None``.
    """

    def __init__(
        self,
        portions: Sequence[Portion[OwnerBucket]],
        rules: RefreshRules,
        transport: Transport,
        exchange: Exchange | None,
    ) -> None:
        self.portions = tuple(portions)
        self._rules = rules
        self._transport = transport
        self._exchange = exchange
        self._routes = [exchange.route(p.exchanged) if p.exchanged else None for p in portions] if exchange else []
        self._under_way: deque[tuple[int, list[Pending]]] = deque()
        self._failure: BaseException | None = None
        self._hooks: list[Any] = []

    def issue(self, index: int) -> None:
        """Collective. Portion ``index`` is stepped: send it."""
        while self._rules.must_wait(len(self._under_way), self.in_flight_bytes):
            self._finish_next()
        pending = []
        if self._rules.is_gathered:
            gathered = cast("Sequence[FlatBucket]", self.portions[index].gathered)
            pending.append(self._transport.gather(gathered, "weight_gather"))
        route = self._routes[index] if self._routes else None
        if self._exchange is not None and route is not None:
            pending.append(self._exchange.start(route))
        self._under_way.append((index, pending))
        if not self._rules.is_lazy and index == len(self.portions) - 1:
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
