"""ZeRO-3: the weights of a part of the model exist only while it computes.

The parts are what comes before the decoder layers (embeddings), the layers one by one, and what comes after them.
Each is a range of rounds. Parts are gathered in one fixed sequence, equal on all ranks whatever they own: forwards,
then the layers backwards; the need for a part issues all that stand before it in the sequence, and ``prefetch`` parts
after it. In the backward pass the reductions of a part are launched when the part before it is needed. So the order
of gathers and reductions together is a property of the model, and a rank that lacks a block takes part all the same.

Freeing resizes the flat tensor's storage to nothing, and gathering fills the same storage again, so that what autograd
saved of a weight is valid again when the backward pass reads it; FSDP's way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from deepspeed_sdp.engine.comm.transport import Pending, Transport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.errors import ConfigError

_Function = TypeVar("_Function", bound=Callable[..., None])


def _eager(function: _Function) -> _Function:
    """Keep a hook out of compiled graphs."""
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


@dataclass
class Part:
    """One range of the model.

    Attributes:
        modules: whose forward pass needs the weights.
        rounds: its rounds, half-open ``(first, last)`` in backward order.
        buckets: this rank's buckets in them, in the total order.
        stays: gathered in the forward pass and kept to the end of the backward pass.
        is_needed_backward: whether its backward pass reads weights (that of an embedding does not).
    """

    modules: Sequence[nn.Module]
    rounds: tuple[int, int]
    buckets: Sequence[FlatBucket]
    stays: bool = False
    is_needed_backward: bool = True
    pending: Pending | None = field(default=None, repr=False)
    is_issued: bool = False

    def free(self) -> None:
        """Give the gathered weights back."""
        if self.is_issued:
            for flat in self.buckets:
                flat.free()
        self.is_issued = False

    @property
    def is_resident(self) -> bool:
        """Whether the parameters have values."""
        return all(flat.is_resident for flat in self.buckets)


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
        self._prefetch = prefetch
        self._sequence: list[int] = []
        self._issued = 0
        self._is_paused = False
        self._phase = "idle"
        self._to_visit: list[int] = []
        self.before_backward: Callable[[int], None] = lambda round_: None
        for part in self._parts:
            for flat in part.buckets:
                flat.keep_shard_only(device, is_pinned)
        self._hooks = [
            module.register_forward_pre_hook(self._begin_forward, prepend=True),
            module.register_forward_hook(self._end_forward),
        ]
        for index, part in enumerate(self._parts):
            for submodule in part.modules:
                self._hooks.append(submodule.register_forward_pre_hook(self._pre_forward(index), prepend=True))
                self._hooks.append(submodule.register_forward_hook(self._post_forward(index)))

    # -- the sequence ------------------------------------------------------------------------------------------------

    @_eager
    def _begin_forward(self, *_: Any) -> None:
        if not self._is_paused and not _in_backward():
            self._start(list(range(len(self._parts))))

    @_eager
    def _end_forward(self, *_: Any) -> None:
        if self._is_paused or _in_backward():
            return
        self._issue_up_to(len(self._sequence))
        last = len(self._parts) - 1
        for index, part in enumerate(self._parts):
            self._settle(part)
            if not torch.is_grad_enabled() or not (part.stays or index >= last - 1):
                part.free()

    def _begin_backward(self) -> None:
        # The last parts are still there, unless this is a second backward pass through the same graph.
        absent = [i for i, part in enumerate(self._parts) if part.is_needed_backward and not part.is_issued]
        self._sequence = sorted(absent, key=lambda i: (not self._parts[i].stays, -i))
        self._issued = 0
        self._to_visit = [i for i, part in enumerate(self._parts) if part.is_needed_backward and not part.stays]
        self._phase = "backward"

    def _visit_down_to(self, index: int) -> None:
        """What the backward passes of the parts down to ``index`` issue, in the one order that all ranks share.

        Hooks of blocks that a rank lacks can fire in another order, or not at all.
        """
        while self._to_visit and self._to_visit[-1] >= index:
            visited = self._to_visit.pop()
            place = self._sequence.index(visited) if visited in self._sequence else -1
            self._issue_up_to(place + 1 + self._prefetch)
            self.before_backward(self._parts[visited].rounds[0])

    def _start(self, sequence: list[int]) -> None:
        for part in self._parts:
            self._settle(part)
            part.free()
        self._sequence, self._issued = sequence, 0
        self._phase = "forward"

    def _issue_up_to(self, count: int) -> None:
        while self._issued < min(count, len(self._sequence)):
            self._issue(self._parts[self._sequence[self._issued]])
            self._issued += 1

    def _issue(self, part: Part, is_kept: bool = True) -> None:
        for flat in part.buckets:
            flat.allocate(is_kept)
        part.pending = self._transport.gather(part.buckets, "weight_gather")
        part.is_issued = True

    def _settle(self, part: Part) -> None:
        if part.pending is not None:
            pending, part.pending = part.pending, None
            pending.finish()
            for flat in part.buckets:
                flat.show()

    def _need(self, index: int) -> None:
        """Have part ``index`` in memory, after all that stand before it in the sequence."""
        place = self._sequence.index(index) if index in self._sequence else -1
        if self._phase == "forward" or self._parts[index].stays:
            self._issue_up_to(place + 1 + self._prefetch)
        for earlier in self._sequence[: max(place, 0)]:
            # What a rank has nothing of is waited for too, or its buffers would pile up.
            self._settle(self._parts[earlier])
        self._settle(self._parts[index])
        if not self._parts[index].is_resident:
            raise ConfigError(
                "zero_optimization.stage: got 3 with a pass through the model that it cannot serve; takes one forward "
                "call of the whole model before each backward pass (two forward calls before one backward pass, or a "
                "call of an inner module, need stage 2 or lower)"
            )

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _pre_forward(self, index: int) -> Callable[..., None]:
        @_eager
        def hook(*_: Any) -> None:
            if self._is_paused:
                return
            if _in_backward():  # activation checkpointing computes it again
                self._need_backward(index)
            else:
                self._need(index)

        return hook

    def _post_forward(self, index: int) -> Callable[..., None]:
        part = self._parts[index]
        # Of what stays, nothing says that its backward pass comes after that of the layers.
        need = self._need_again if part.stays else self._need_backward

        @_eager
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if self._is_paused or _in_backward():
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad and part.is_needed_backward:
                hidden.register_hook(lambda _: need(index))  # type: ignore[no-untyped-call]
            is_last = module is part.modules[-1]
            if is_last and not part.stays and index < len(self._parts) - 2:
                part.free()

        return hook

    @_eager
    def _need_again(self, index: int) -> None:
        if self._phase != "backward":
            self._begin_backward()
        self._need(index)

    @_eager
    def _need_backward(self, index: int) -> None:
        if self._phase != "backward":
            self._begin_backward()
        self._visit_down_to(index)
        self._need(index)
        for later in self._parts[index + 1 :]:
            if later.is_issued and not later.stays and later.pending is None:
                later.free()

    def complete_backward(self) -> None:
        """The backward pass is over: issue what its hooks did not come to, before the last gradients are reduced."""
        if self._phase != "backward":
            self._begin_backward()
        self._visit_down_to(0)
        self._issue_up_to(len(self._sequence))

    def end_backward(self) -> None:
        """Nothing stays in memory."""
        self._start([])
        self._phase = "idle"

    def close(self) -> None:
        """Take the hooks off and free all weights, but for those that a collective may still write to."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for part in self._parts:
            if part.pending is None:
                part.free()

    # -- outside of training -----------------------------------------------------------------------------------------

    @contextmanager
    def gathered(self, parts: Sequence[int]) -> Iterator[None]:
        """Collective, between steps: the weights of ``parts`` are in memory inside, and views of them last."""
        for index in parts:
            self._issue(self._parts[index], is_kept=False)
        try:
            for index in parts:
                self._settle(self._parts[index])
            yield
        finally:
            for index in parts:
                self._parts[index].free()

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
