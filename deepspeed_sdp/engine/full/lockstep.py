"""Forward passes of many batches that meet at every layer, so that a layer's weights are needed once for all of them.

The model's own forward runs, once for each batch, in a thread of its own with its layers swapped for stand-ins; one
thread runs at a time. A stand-in hands what it is called with to the caller, who computes the layer, and goes on with
what the caller returns. So the model's code stays untouched, and what stands between layers is computed where it
stands.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from deepspeed_sdp.adapters import Layer
from deepspeed_sdp.subnetwork.cutting import replace_module


class Call(NamedTuple):
    """What a pass calls a layer with."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Abandoned(BaseException):
    """Ends a pass that nobody waits for any more."""


class _StandIn(nn.Module):
    """Takes the place of a layer; what the model asks of the layer beyond calling it, the layer answers."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, index=index)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        of_thread: Pass = _running.now
        return of_thread.meet(Call(self.__dict__["index"], args, kwargs))


_running = threading.local()


class Pass:
    """One forward pass.

    Args:
        run: the pass; called in a thread with the caller's modes of autograd, autocast and device.
        device: of the model.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self._to_caller: queue.SimpleQueue[Call | Exception | _Abandoned | tuple[Any]] = queue.SimpleQueue()
        self._to_pass: queue.SimpleQueue[tuple[Any] | _Abandoned] = queue.SimpleQueue()
        modes = _modes(device)
        self._thread = threading.Thread(target=self._main, args=(run, modes), daemon=True)
        self._is_over = False

    def begin(self) -> "Call | Any":
        """Run to the first layer; see :meth:`go_on`."""
        self._thread.start()
        return self._next()

    def go_on(self, output: Any) -> "Call | Any":
        """Run on with a layer's output: to the call of the next layer, or to the end, which gives the pass's output."""
        self._to_pass.put((output,))
        return self._next()

    def abandon(self) -> None:
        """End it where it stands."""
        if not self._is_over and self._thread.is_alive():
            self._to_pass.put(_Abandoned())
            self._thread.join()

    def meet(self, call: Call) -> Any:
        """Inside the pass: hand over the call of a layer, and wait for its output."""
        self._to_caller.put(call)
        answer = self._to_pass.get()
        if isinstance(answer, _Abandoned):
            raise answer
        return answer[0]

    def _next(self) -> "Call | Any":
        found = self._to_caller.get()
        if isinstance(found, Call):
            return found
        self._is_over = True
        self._thread.join()
        if isinstance(found, BaseException):
            raise found
        return found[0]

    def _main(self, run: Callable[[], Any], modes: Callable[[], ExitStack]) -> None:
        _running.now = self
        try:
            with modes():
                self._to_caller.put((run(),))
        except (Exception, _Abandoned) as error:
            self._to_caller.put(error)


def _modes(device: torch.device) -> Callable[[], ExitStack]:
    """What enters, in another thread, the modes that this one is in."""
    is_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kind = device.type
    is_autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    accelerator = get_accelerator()
    stream = None if kind == "cpu" else accelerator.current_stream()

    def enter() -> ExitStack:
        stack = ExitStack()
        if stream is not None:
            accelerator.set_device(device.index)
            stack.enter_context(accelerator.stream(stream))
        stack.enter_context(torch.inference_mode(is_inference))
        stack.enter_context(torch.set_grad_enabled(is_grad))
        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=is_autocast))
        return stack

    return enter


@contextmanager
def swapped(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, stand-ins take the places of ``layers`` in ``model``."""
    try:
        for index, (name, layer) in enumerate(layers):
            replace_module(model, name, _StandIn(layer, index))
        yield
    finally:
        for name, layer in layers:
            replace_module(model, name, layer)


def outputs_in_step(
    model: nn.Module,
    layers: Sequence[Layer],
    runs: Sequence[Callable[[], Any]],
    computing: Callable[[int], AbstractContextManager[Callable[..., Any]]],
    device: torch.device,
) -> Iterator[Any]:
    """What each of ``runs``, a call of ``model``, returns, one at a time.

    Args:
        layers: of the model; each pass calls them once, in this order.
        computing: inside, what computes the layer of a number.
    """
    passes = [Pass(run, device) for run in runs]
    calls: list[Any] = []
    try:
        with swapped(model, layers):
            calls += [of_batch.begin() for of_batch in passes]
        for index in range(len(layers)):
            # Stand-ins are away while weights are gathered, which are looked for in the layers.
            with computing(index) as compute, swapped(model, layers):
                for place, of_batch in enumerate(passes):
                    call, calls[place] = calls[place], None
                    if not isinstance(call, Call) or call.layer != index:
                        raise RuntimeError(f"{type(model).__name__} does not call its layers once each, in order")
                    output = compute(*call.args, **call.kwargs)
                    # What it was called with need not outlive this.
                    del call
                    output = of_batch.go_on(output)
                    if index + 1 == len(layers):
                        yield output
                    else:
                        calls[place] = output
                    del output
    finally:
        for of_batch in passes:
            of_batch.abandon()
