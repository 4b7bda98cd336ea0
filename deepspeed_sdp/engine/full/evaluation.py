"""The full model's loss in mid-run, one gathered layer at a time.

The model's own forward runs twice with its layers swapped: first for layers that only record what they are called with,
last for layers that replay the result. In between, every layer of the full model is gathered once and applied to all
batches. So weights travel once per sweep, and the model code stays untouched.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.full.gather import Access, gather_space, layers_name, shared_parameters
from deepspeed_sdp.errors import StateError
from deepspeed_sdp.ranks import gather_objects, reduce_numbers
from deepspeed_sdp.subnetwork import Subnetwork

# Batches whose hidden states are held at a time.
BATCHES_PER_SWEEP = 32


class _LastLayerReached(Exception):
    pass


class _StandIn(nn.Module):
    """Takes the place of a layer; what the model asks of the layer beyond calling it, the layer answers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


class _Recorder(_StandIn):
    def __init__(self, layer: nn.Module, calls: list["_Call"], is_last: bool) -> None:
        super().__init__(layer)
        self.__dict__.update(calls=calls, is_last=is_last)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((hidden_states, args, kwargs))
        if self.is_last:
            raise _LastLayerReached
        return hidden_states


class _Replay(_StandIn):
    def __init__(self, layer: nn.Module, output: torch.Tensor | None) -> None:
        super().__init__(layer)
        self.__dict__["output"] = output

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor | None = self.output
        return hidden_states if output is None else output


_Call = tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def evaluate_full(subnetwork: Subnetwork, batches: Iterable[Mapping[str, torch.Tensor]], access: Access) -> float:
    """Collective; see :meth:`SDPEngine.evaluate_full`. Batches are what the model takes, with ``labels`` ``[B, T]``."""
    mine = [{name: value.to(access.device) for name, value in batch.items()} for batch in batches]
    if subnetwork.masking == "backward":
        with eval_mode(subnetwork.module):
            total = sum(
                (sum_of_losses(subnetwork.module(**batch).loss, batch) for batch in mine), nothing(access.device)
            )
        return mean_over_ranks(total)
    sweeps = max(gather_objects(-(-len(mine) // BATCHES_PER_SWEEP), "agreeing on batches to evaluate"))
    total = nothing(access.device)
    with eval_mode(subnetwork.module), access.readable(None):
        for sweep in range(sweeps):
            total += _sweep(subnetwork, mine[sweep * BATCHES_PER_SWEEP : (sweep + 1) * BATCHES_PER_SWEEP], access)
    return mean_over_ranks(total)


def mean_over_ranks(total: torch.Tensor) -> float:
    """Collective. The mean loss, from every rank's sum of losses and number of predicted tokens, ``[2]``."""
    total = reduce_numbers(total, "adding up losses")
    if not total[1]:
        raise StateError("evaluate_full: no rank brought a batch with a predicted token")
    return float(total[0] / total[1])


def nothing(device: torch.device) -> torch.Tensor:
    """Sum of losses and number of predicted tokens, ``[2]`` float64: of no batch."""
    return torch.zeros(2, dtype=torch.float64, device=device)


def sum_of_losses(loss: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum of losses and number of predicted tokens of a batch, ``[2]`` float64."""
    tokens = (batch["labels"][:, 1:] != -100).sum()
    return torch.stack([loss.double() * tokens, tokens.double()]) if tokens else nothing(loss.device)


def _sweep(subnetwork: Subnetwork, batches: Sequence[Mapping[str, torch.Tensor]], access: Access) -> torch.Tensor:
    """Sum of losses and number of predicted tokens, ``[2]`` float64."""
    total = nothing(access.device)
    for batch, output in zip(batches, outputs_of(subnetwork, batches, access), strict=True):
        total += sum_of_losses(output.loss, batch)
    return total


def outputs_of(subnetwork: Subnetwork, batches: Sequence[Mapping[str, Any]], access: Access) -> Iterator[Any]:
    """Collective, inside ``access.readable(None)``. What the full model returns for each batch."""
    calls = [_record(subnetwork, batch) for batch in batches]
    hidden = [call[0][0] for call in calls]
    skeleton = subnetwork.full.skeleton
    for index, layer in enumerate(subnetwork.adapter.layers(skeleton)):
        with access.readable(index):
            weights = _gather_layer(subnetwork, index, access)
            for i, call in enumerate(calls):
                _, args, kwargs = call[index]
                output = torch.func.functional_call(layer, weights, (hidden[i], *args), kwargs)
                hidden[i] = output[0] if isinstance(output, tuple) else output
            # Not beside the next layer's.
            del weights
    for batch, last in zip(batches, hidden, strict=True):
        with _swapped_layers(subnetwork, _replays(subnetwork, last)):
            output = subnetwork.module(**batch)
        yield output


def _record(subnetwork: Subnetwork, batch: Mapping[str, Any]) -> list[_Call]:
    calls: list[_Call] = []
    layers = list(subnetwork.adapter.layers(subnetwork.module))
    recorders = [_Recorder(layer, calls, layer is layers[-1]) for layer in layers]
    with _swapped_layers(subnetwork, recorders), suppress(_LastLayerReached):
        subnetwork.module(**batch)
    return calls


def _replays(subnetwork: Subnetwork, output: torch.Tensor) -> list[_Replay]:
    layers = list(subnetwork.adapter.layers(subnetwork.module))
    return [_Replay(layer, output if layer is layers[-1] else None) for layer in layers]


def _gather_layer(subnetwork: Subnetwork, index: int, access: Access) -> dict[str, torch.Tensor]:
    prefix = f"{layers_name(subnetwork)}.{index}."
    weights = shared_parameters(subnetwork, index)
    for planned in subnetwork.plan.spaces:
        if planned.space.layer == index:
            weights.update(gather_space(subnetwork, planned, access))
    weights.update((n, b) for n, b in subnetwork.module.named_buffers() if n.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in weights.items()}


@contextmanager
def _swapped_layers(subnetwork: Subnetwork, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    layers = subnetwork.adapter.layers(subnetwork.module)
    own = list(layers)
    try:
        for i, stand_in in enumerate(stand_ins):
            layers[i] = stand_in
        yield
    finally:
        for i, layer in enumerate(own):
            layers[i] = layer


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module of ``model`` is in evaluation mode; after it each is as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
