"""The true peak of what torch's allocator hands out in one step, and what it is made of.

On an accelerator the peak is ``max_memory_allocated``. On a CPU it is the running sum of the profiler's memory events
from before the model is built, which sees every block of torch's CPU allocator, temporaries inside of an operator too.
Neither holds what a communication library allocates for itself.

What it is made of is sampled after every operator, forward, backward and update:

weights      storages of parameters and buffers (shards, at ZeRO-3 and FSDP2), between two steps
optimizer    its state, and master weights
gradients    alive at the peak, reduced and not yet reduced
activations  alive at the peak: what autograd keeps for the backward pass, each storage once, weights not counted
rest         the difference to the peak: temporaries, gathered weights, buffers of the communication
"""

import contextlib
import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from systems import System
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_sdp.engine.zero.freed_weight import FreedWeight

# Operators between two walks over all gradients, which take as long as an operator.
_WALK_EVERY = 4
KINDS = ("weights", "gradients", "optimizer", "activations", "rest")


def peak_memory(make: Callable[[], System], step: Callable[[System], Any]) -> dict[str, int]:
    """Collective. Build a system, and measure its second step; the first one makes the optimizer's state.

    Returns:
        bytes of ``peak`` and of each of ``KINDS``, which add up to it; ``largest_gradients`` and
        ``largest_activations``: the most that was alive of them, at moments of their own.
    """
    with _Allocator() as allocator:
        system = make()
        step(system)
        # Cycles that building left behind are no part of a step.
        gc.collect()
        samples = _Samples(system, allocator)
        began = time.time_ns()
        allocator.reset()
        with samples:
            step(system)
        get_accelerator().synchronize()
        ended = time.time_ns()
    moment, peak = allocator.peak(began, ended, samples.total)
    state = system.state_bytes()
    held = samples.at(moment)
    figures = {
        "weights": state["weights"],
        "gradients": held.gradients,
        "optimizer": state["optimizer"],
        "activations": held.activations,
    }
    figures["rest"] = peak - sum(figures.values())
    largest = {"largest_gradients": samples.largest_gradients, "largest_activations": samples.largest_activations}
    return {"peak": peak, **figures, **largest}


class _Allocator:
    """Total bytes alive, with the moment of the largest."""

    def __init__(self) -> None:
        self.is_cpu = get_accelerator().device_name() == "cpu"
        self._base = 0
        self._profile: Any = None

    def __enter__(self) -> "_Allocator":
        if self.is_cpu:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        else:
            self._base = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.is_cpu:
            self._profile.__exit__(*error)

    def reset(self) -> None:
        """The step begins."""
        if not self.is_cpu:
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Bytes now, on an accelerator."""
        return 0 if self.is_cpu else torch.cuda.memory_allocated() - self._base

    def peak(self, began: int, ended: int, sampled: Counter[int]) -> tuple[int, int]:
        """Its moment and bytes."""
        if not self.is_cpu:
            moment, _ = max(sampled.items(), key=lambda item: item[1])
            return moment, torch.cuda.max_memory_allocated() - self._base
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        alive, moment, peak = 0, began, 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            now = event.start_ns()
            if now > ended:
                break
            # The first event of the step stands for what was alive when it began.
            if now >= began and alive > peak:
                moment, peak = now, alive
        return moment, peak


@dataclass
class _Held:
    moment: int
    gradients: int
    activations: int


@dataclass
class _Saved:
    """A tensor as autograd keeps it; gone when autograd lets go of it."""

    tensor: torch.Tensor


@dataclass
class _Activations:
    """Storages that autograd keeps now."""

    module: torch.nn.Module
    holders: Counter[int] = field(default_factory=Counter)
    sizes: dict[int, int] = field(default_factory=dict)
    nbytes: int = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address == 0 or address in self._weights():
            return tensor
        if not self.holders[address]:
            self.sizes[address] = size
            self.nbytes += size
        self.holders[address] += 1
        # Detached: a tensor that autograd's own node holds again would never be freed.
        saved = _Saved(tensor.detach())
        weakref.finalize(saved, self._release, address)
        return saved

    @staticmethod
    def unpack(saved: Any) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    def _release(self, address: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            self.nbytes -= self.sizes.pop(address)

    def _weights(self) -> set[int]:
        # As they are now: sharded weights are gathered into other storages, or freed.
        tensors = (*self.module.parameters(), *self.module.buffers())
        there = (t for t in tensors if not hasattr(t, "to_local") and not isinstance(t, FreedWeight))
        return {t.untyped_storage().data_ptr() for t in there}


class _Samples(TorchDispatchMode):
    """Gradients and activations after every operator, and on an accelerator the allocator's total."""

    def __init__(self, system: System, allocator: _Allocator) -> None:
        super().__init__()
        self._system, self._allocator = system, allocator
        self._activations = _Activations(system.module)
        self._held: list[_Held] = []
        self._stack = contextlib.ExitStack()
        self._is_sampling = False
        self._gradients = 0
        self.total: Counter[int] = Counter()
        self.largest_gradients = 0
        self.largest_activations = 0

    def __enter__(self) -> Any:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._activations.pack, self._activations.unpack)
        self._stack.enter_context(hooks)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_sampling:
            with self._once():
                self._sample()
        return result

    @contextlib.contextmanager
    def _once(self) -> Iterator[None]:
        self._is_sampling = True
        try:
            yield
        finally:
            self._is_sampling = False

    def _sample(self) -> None:
        now, activations = time.time_ns(), self._activations.nbytes
        if len(self._held) % _WALK_EVERY == 0:
            self._gradients = self._system.gradient_bytes()
        self._held.append(_Held(now, self._gradients, activations))
        self.total[now] = self._allocator.allocated()
        self.largest_gradients = max(self.largest_gradients, self._gradients)
        self.largest_activations = max(self.largest_activations, activations)

    def at(self, moment: int) -> _Held:
        """The last sample up to ``moment``."""
        before = [held for held in self._held if held.moment <= moment]
        return before[-1] if before else self._held[0]
