"""One forward and backward pass on the meta device: when which gradient comes, and what lives meanwhile.

Nothing is inferred from formulas: the worker's own modules run, with shapes and without memory, and every storage is
followed (:mod:`~deepspeed_sdp.estimate.live_bytes`). What a layer does is seen on one of its kind, and told for all.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from deepspeed_sdp.adapters.base import AbsentModule
from deepspeed_sdp.estimate.attention import fused_attention
from deepspeed_sdp.estimate.live_bytes import LiveBytes
from deepspeed_sdp.estimate.worker_model import WorkerModel

Kind = Literal["forward", "loss", "backward", "gradient", "end"]


# Where a gradient reaches the outputs of the last part, which is after that of the loss.
_BEGIN = "*"


class Moment(NamedTuple):
    """A point in a pass, in the order of time.

    Attributes:
        kind: ``"forward"`` and ``"backward"``: that of a part begins; ``"loss"``: the forward pass is over;
            ``"gradient"``: that of a weight is complete; ``"end"``: the backward pass is over.
        part: of the model, see :class:`~deepspeed_sdp.estimate.worker_model.Weight`.
        weight: local name, of a gradient.
        live: bytes of activations then, without the gradients of weights.
        peak: the most since the moment before; the gradient at hand counts.
    """

    kind: Kind
    part: int
    weight: str
    live: int
    peak: int


@dataclass
class Profile:
    """What a part does to the bytes that live, beside those at the beginning of its forward pass.

    ``forward``: (peak, bytes left) of its forward pass; ``backward``: its moments, the last one without a weight.
    """

    forward: tuple[int, int] = (0, 0)
    backward: list[tuple[str, int, int]] = field(default_factory=list)


def trace(model: WorkerModel, micro_batch: int, seq_length: int, checkpointing: bool = False) -> list[Moment]:
    """The moments of one micro-batch's passes, of all layers.

    Args:
        checkpointing: every layer is computed again in the backward pass (without re-entrant autograd).
    """
    return told(model, profiles(model, micro_batch, seq_length, checkpointing))


def told(model: WorkerModel, found: dict[int, Profile]) -> list[Moment]:
    """The moments of all layers of ``model``, from what was seen of those that were kept."""
    return list(_moments(model, found))


def _moments(model: WorkerModel, profiles: dict[int, Profile]) -> Iterator[Moment]:
    last = model.last_part
    kept = max(model.stand_in) + 2
    of_part = [profiles[0], *(profiles[1 + place] for place in model.stand_in), profiles[kept]]
    base, bases = 0, []
    peak = 0
    for part, profile in enumerate(of_part):
        bases.append(base)
        yield Moment("forward", part, "", base, peak)
        peak = base + profile.forward[0]
        base += profile.forward[1]
    yield Moment("loss", last, "", base, peak)
    live = peak = base
    for part in reversed(range(last + 1)):
        if part != last and of_part[part].backward:
            yield Moment("backward", part, "", live, peak)
            peak = live
        prefix = f"{model.kept[model.stand_in[part - 1]]}." if 0 < part < last else ""
        for weight, at, most in of_part[part].backward:
            live, most = bases[part] + at, bases[part] + most
            if weight == _BEGIN:
                yield Moment("backward", part, "", live, max(peak, most))
                peak = live
            elif weight:
                name = f"{model.layers[part - 1]}.{weight.removeprefix(prefix)}" if prefix else weight
                yield Moment("gradient", part, name, live, max(peak, most))
                peak = live
            else:
                peak = max(peak, most)
    yield Moment("end", 0, "", live, peak)


def profiles(model: WorkerModel, micro_batch: int, seq_length: int, checkpointing: bool) -> dict[int, Profile]:
    """What every part of the module does; see :func:`trace`."""
    module: Any = model.module
    if checkpointing:
        _checkpoint(module, True)
    module.train()
    recorder = _Recorder(LiveBytes([*module.parameters(), *module.buffers()]))
    hooks = recorder.hook(module, [module.get_submodule(name) for name in model.kept])
    inputs = model.task.example(module.config, micro_batch, seq_length, next(module.parameters()))
    try:
        with fused_attention(), recorder.live:
            loss = module(**inputs).loss
            recorder.end_forward()
            torch.autograd.backward(loss)
            recorder.leave()
    finally:
        for hook in hooks:
            hook.remove()
        if checkpointing:
            _checkpoint(module, False)
    return recorder.profiles


def _checkpoint(module: Any, is_on: bool) -> None:
    with warnings.catch_warnings():
        # Newer versions of transformers have new names for these.
        warnings.simplefilter("ignore", FutureWarning)
        if is_on:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            module.gradient_checkpointing_disable()


class _Recorder:
    """Watches the parts of a model come and go."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.profiles: dict[int, Profile] = {0: Profile()}
        self._bases = {0: 0}
        self._part = 0
        self._is_backward = False
        self._is_past_layers = False
        self._has_begun = False

    def hook(self, module: nn.Module, layers: Sequence[nn.Module]) -> list[Any]:
        self._last = len(layers) + 1
        hooks: list[Any] = [layers[0].register_forward_pre_hook(self._watch_input, with_kwargs=True)]
        for index, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(self._enter(index + 1), prepend=True))
            hooks.append(layer.register_forward_hook(self._leave_layer(index + 1)))
        inside = {id(submodule) for layer in layers for submodule in layer.modules()}
        hooks += [
            m.register_forward_pre_hook(self._after_layers, prepend=True)
            for m in module.modules()
            if id(m) not in inside
        ]
        hooks += [
            m.register_forward_hook(self._watch_output)
            for m in module.modules()
            if id(m) not in inside and next(m.parameters(recurse=False), None) is not None
        ]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient(name)))  # type: ignore[no-untyped-call]
        return hooks

    def _watch_input(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not self._is_backward and hidden.requires_grad:
            hidden.register_hook(lambda _: self._begin_backward(0))

    def _watch_output(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        if self._part == self._last:
            output.register_hook(lambda _: self._begin_last())  # type: ignore[no-untyped-call]

    def _begin_last(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._note(_BEGIN)

    def _enter(self, part: int) -> Any:
        def hook(*_: Any) -> None:
            if not self._is_backward:
                self._next(part)

        return hook

    def _leave_layer(self, part: int) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if self._is_backward:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            # The output of an absent layer is that of the one before.
            if not isinstance(module, AbsentModule):
                hidden.register_hook(lambda _: self._begin_backward(part))
            self._is_past_layers = part == self._last - 1

        return hook

    def _after_layers(self, *_: Any) -> None:
        # Not when the last layer ends: its caller still holds its input then.
        if self._is_past_layers:
            self._is_past_layers = False
            self._next(self._last)

    def _next(self, part: int) -> None:
        base = self._bases[self._part]
        self.profiles[self._part].forward = (self.live.take_peak() - base, self.live.now - base)
        if part <= self._last:
            self._part = part
            self._bases[part] = self.live.now
            self.profiles[part] = Profile()

    def end_forward(self) -> None:
        self._next(self._last + 1)
        self._is_backward = True

    def _begin_backward(self, part: int) -> None:
        self.leave()
        self._part = part

    def leave(self) -> None:
        self._note("")

    def _on_gradient(self, name: str) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            parameter.grad = None
            self._note(name)

        return hook

    def _note(self, weight: str) -> None:
        base = self._bases[self._part]
        self.profiles[self._part].backward.append((weight, self.live.now - base, self.live.take_peak() - base))
