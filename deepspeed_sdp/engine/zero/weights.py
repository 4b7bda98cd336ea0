"""ZeRO-3: the weights of a part of the model exist only while it computes.

The parts are what comes before the decoder layers (embeddings), the layers one by one, and what comes after them.
Here hooks tell the :class:`~deepspeed_sdp.plan.schedule.Schedule` what the passes do, and parts do what it asks for.

Freeing resizes the flat tensor's storage to nothing, and gathering fills the same storage again, so that what autograd
saved of a weight is valid again when the backward pass reads it; FSDP's way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from deepspeed_sdp.engine.comm.transport import Transport
from deepspeed_sdp.engine.zero.part import Part, State
from deepspeed_sdp.engine.zero.rounds import schedule_of
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.plan.schedule import Action, Steps

_Function = TypeVar("_Function", bound=Callable[..., None])


def _eager(function: _Function) -> _Function:
    """Keep a hook out of compiled graphs."""
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class ShardedWeights:
    """Gathers and frees the parts of one rank's subnetwork.

    Args:
        module: the whole model; its forward call begins the sequence.
        parts: in forward order.
        transport: moves the shards, on a process group that nothing else uses.
        prefetch: parts gathered ahead of the one that computes.
        device: where the shards rest.
        is_pinned: whether in page-locked memory.

    Attributes:
        before_backward: called with the first round of a part when its backward pass begins: whatever the backward pass
            reaches of the rounds before, it has reached. It launches their reductions, which are launched nowhere else.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Sequence[Part],
        transport: Transport,
        prefetch: int,
        device: torch.device,
        is_pinned: bool = False,
    ) -> None:
        self._parts = tuple(parts)
        self._transport = transport
        self._schedule = schedule_of([part.use for part in parts], prefetch)
        self._is_paused = False
        self.before_backward: Callable[[int], None] = lambda round_: None
        for part in self._parts:
            part.keep_shards(device, is_pinned)
        self._hooks = [
            module.register_forward_pre_hook(self._begin_forward, prepend=True),
            module.register_forward_hook(self._end_forward),
        ]
        for index, part in enumerate(self._parts):
            for submodule in part.modules:
                self._hooks.append(submodule.register_forward_pre_hook(self._pre_forward(index), prepend=True))
                self._hooks.append(submodule.register_forward_hook(self._post_forward(index)))

    def _run(self, steps: Steps) -> None:
        for action, index in steps:
            part = self._parts[index]
            if action is Action.UNSHARD:
                part.unshard(self._transport)
            elif action is Action.WAIT:
                part.wait()
            elif action is Action.RESHARD:
                part.reshard()
            else:
                self.before_backward(part.rounds.start)

    def _need(self, index: int, steps: Steps) -> None:
        self._run(steps)
        if not self._parts[index].is_readable:
            raise ConfigError(
                "zero_optimization.stage: got 3 with a pass through the model that it cannot serve; takes one forward "
                "call of the whole model before each backward pass (two forward calls before one backward pass, or a "
                "call of an inner module, need stage 2 or lower)"
            )

    # -- hooks -------------------------------------------------------------------------------------------------------

    @_eager
    def _begin_forward(self, *_: Any) -> None:
        if not self._is_paused and not _in_backward():
            self._run(self._schedule.begin_forward())

    @_eager
    def _end_forward(self, *_: Any) -> None:
        if not self._is_paused and not _in_backward():
            self._run(self._schedule.end_forward(torch.is_grad_enabled()))

    def _pre_forward(self, index: int) -> Callable[..., None]:
        @_eager
        def hook(*_: Any) -> None:
            if self._is_paused:
                return
            if _in_backward():  # activation checkpointing computes it again
                self._need_backward(index)
            else:
                self._need(index, self._schedule.before_forward(index))

        return hook

    def _post_forward(self, index: int) -> Callable[..., None]:
        part = self._parts[index]

        @_eager
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if self._is_paused or _in_backward():
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad and part.use.is_needed_backward:
                hidden.register_hook(lambda _: self._need_backward(index))  # type: ignore[no-untyped-call]
            if module is part.modules[-1]:
                self._run(self._schedule.after_forward(index))

        return hook

    @_eager
    def _need_backward(self, index: int) -> None:
        self._need(index, self._schedule.before_backward(index))

    def complete_backward(self) -> None:
        """The backward pass is over: issue what its hooks did not come to, before the last gradients are reduced."""
        self._run(self._schedule.complete_backward())

    def end_backward(self) -> None:
        """Nothing stays in memory."""
        self._run(self._schedule.end_backward())

    def close(self) -> None:
        """Take the hooks off and free all weights, but for those that a collective may still write to."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for part in self._parts:
            if part.state is not State.UNSHARDING:
                part.reshard()

    # -- outside of training -----------------------------------------------------------------------------------------

    @contextmanager
    def gathered(self, parts: Sequence[int]) -> Iterator[None]:
        """Collective, between steps: the weights of ``parts`` are in memory inside, and views of them last."""
        wanted = [self._parts[index] for index in parts]
        for part in wanted:
            part.wait()  # a pass may have issued it
            part.unshard(self._transport, is_kept=False)
        try:
            for part in wanted:
                part.wait()
            yield
        finally:
            for part in wanted:
                part.reshard()
            self._schedule.forget(parts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward calls inside gather nothing."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @property
    def outer(self) -> tuple[int, int]:
        """The parts before and after the layers."""
        return 0, len(self._parts) - 1


def _in_backward() -> bool:
    # The id of the running autograd task: private, and what DeepSpeed itself asks (runtime/base_optimizer.py).
    return torch._C._current_graph_task_id() != -1
