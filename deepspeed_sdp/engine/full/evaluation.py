"""The full model's loss in mid-run, one gathered layer at a time.

The passes of many batches go through the model together (:mod:`~deepspeed_sdp.engine.full.lockstep`): every layer of
the full model is gathered once and applied to all of them. So weights travel once per sweep, and the model's own code
runs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters.tasks import Task
from deepspeed_sdp.engine.full.gather import Access, gather_space, shared_parameters
from deepspeed_sdp.engine.full.lockstep import outputs_in_step
from deepspeed_sdp.errors import StateError
from deepspeed_sdp.ranks import gather_objects, reduce_numbers
from deepspeed_sdp.subnetwork import Subnetwork

# Batches whose hidden states are held at a time.
BATCHES_PER_SWEEP = 32


@torch.no_grad()
def evaluate_full(subnetwork: Subnetwork, batches: Iterable[Mapping[str, torch.Tensor]], access: Access) -> float:
    """Collective; see :meth:`SDPEngine.evaluate_full`. Batches are what the model takes, with ``labels``."""
    mine = [{name: value.to(access.device) for name, value in batch.items()} for batch in batches]
    if subnetwork.masking == "backward":
        with eval_mode(subnetwork.module):
            task = subnetwork.adapter.task
            losses = (sum_of_losses(subnetwork.module(**batch).loss, batch, task) for batch in mine)
            total = sum(losses, nothing(access.device))
        return mean_over_ranks(total)
    sweeps = max(gather_objects(-(-len(mine) // BATCHES_PER_SWEEP), "agreeing on batches to evaluate"))
    total = nothing(access.device)
    with eval_mode(subnetwork.module), access.readable(None):
        for sweep in range(sweeps):
            total += _sweep(subnetwork, mine[sweep * BATCHES_PER_SWEEP : (sweep + 1) * BATCHES_PER_SWEEP], access)
    return mean_over_ranks(total)


def mean_over_ranks(total: torch.Tensor) -> float:
    """Collective. The mean loss, from every rank's sum of losses and number of predictions, ``[2]``."""
    total = reduce_numbers(total, "adding up losses")
    if not total[1]:
        raise StateError("evaluate_full: no rank brought a batch with something to predict")
    return float(total[0] / total[1])


def nothing(device: torch.device) -> torch.Tensor:
    """Sum of losses and number of predictions, ``[2]`` float64: of no batch."""
    return torch.zeros(2, dtype=torch.float64, device=device)


def sum_of_losses(loss: torch.Tensor, batch: Mapping[str, torch.Tensor], task: Task) -> torch.Tensor:
    """Sum of losses and number of predictions of a batch, ``[2]`` float64."""
    targets = task.num_targets(batch)
    return torch.stack([loss.double() * targets, targets.double()]) if targets else nothing(loss.device)


def _sweep(subnetwork: Subnetwork, batches: Sequence[Mapping[str, torch.Tensor]], access: Access) -> torch.Tensor:
    """Sum of losses and number of predictions, ``[2]`` float64."""
    total = nothing(access.device)
    for batch, output in zip(batches, outputs_of(subnetwork, batches, access), strict=True):
        total += sum_of_losses(output.loss, batch, subnetwork.adapter.task)
    return total


def outputs_of(subnetwork: Subnetwork, batches: Sequence[Mapping[str, Any]], access: Access) -> Iterator[Any]:
    """Collective, inside ``access.readable(None)``. What the full model returns for each batch."""
    full = subnetwork.adapter.layers(subnetwork.full.skeleton)

    @contextmanager
    def computing(index: int) -> Iterator[Callable[..., Any]]:
        with access.readable(index):
            weights = _gather_layer(subnetwork, index, access)
            yield lambda *args, **kwargs: torch.func.functional_call(full[index].module, weights, args, kwargs)

    runs = [functools.partial(subnetwork.module, **batch) for batch in batches]
    own = subnetwork.adapter.layers(subnetwork.module)
    yield from outputs_in_step(subnetwork.module, own, runs, computing, access.device)


def _gather_layer(subnetwork: Subnetwork, index: int, access: Access) -> dict[str, torch.Tensor]:
    prefix = f"{subnetwork.layer_names[index]}."
    weights = shared_parameters(subnetwork, index, access)
    for planned in subnetwork.plan.spaces:
        if planned.space.layer == index:
            weights.update(gather_space(subnetwork, planned, access))
    weights.update((n, b) for n, b in subnetwork.module.named_buffers() if n.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in weights.items()}


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
