"""How loud the parts of a model are, put together.

Under forward masking a subnetwork makes up for the units that it lacks (``output_scaling``), and the full model has
them all. What it adds to the residual stream is then too much: after training the units of a subnetwork pull together,
so that the full model wants about the mean of what its subnetworks add, ``coverage`` times the factor of a subnetwork.
One number says it, the *full scale*: what the full model's writes (``o_proj``, ``down_proj``) are multiplied by.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist

from deepspeed_sdp.adapters.tasks import Batch, Task
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.ranks import gather_objects

log = logging.getLogger(__name__)

# Of neighbours in the search, a quarter of an octave: between them a parabola is as good as the loss.
_STEP = 2.0**0.25
# Powers of the coverage in the factor of a subnetwork's units.
_POWERS = {"none": 0.0, "inverse_sqrt_coverage": 0.5, "inverse_coverage": 1.0}


def calibrated(
    loss: Callable[[float, Sequence[Batch]], float], batches: Sequence[Batch], scales: list[float], task: Task
) -> float:
    """Collective. The full scale with the least loss on one half of the text, if the other half bears it out; else 1.

    Says in words, on rank 0, where the text is too little, the scale is at a bound, or no better than none.

    Args:
        loss: collective; of the full model at a scale, over the batches of all ranks.
        batches: this rank's, with ``labels`` in each.
        scales: what is tried, see :func:`scales_to_try`.
    """
    fitted, held_back, count = halves(batches, task)
    if count < 2:
        _warn(f"calibrate: got {count} samples over all ranks, takes 2 or more; the full model's scale is 1")
        return 1.0
    found = best_scale(lambda scale: loss(scale, fitted), scales)
    before, after = (loss(scale, held_back) for scale in (1.0, found))
    if not after < before:
        _warn(
            f"calibrate: scale {found:.3f} is no better on samples held back for it (loss {after:.4f}, {before:.4f} "
            "without); the full model's scale is 1"
        )
        return 1.0
    if found in (scales[0], scales[-1]):
        _warn(
            f"calibrate: scale {found:.3f} is the {'least' if found == scales[0] else 'largest'} that is tried (loss "
            f"{after:.4f}, {before:.4f} without): the model is trained too little, or samples are too few, to find one"
        )
    return found


def scales_to_try(plan: SubnetworkPlan, sdp: SDPConfig) -> list[float]:
    """From the mean of what subnetworks add to the sum of strangers, a step beyond each; ascending.

    Units that pull together add in proportion to their number: all of them ``1 / C`` of what a subnetwork's do, and
    that has the factor ``C ** -power``. Units that know nothing of each other add like a root. A trained model lies
    between the two; where a scale far below them has the least loss, the model is better silent: it was hardly trained.
    """
    coverages = [plan.coverage_of_kind(planned.space.kind) for planned in plan.spaces]
    power = _POWERS[sdp.output_scaling]
    least = min(coverage ** (1.0 - power) for coverage in coverages)
    most = max(coverage ** (0.5 - power) for coverage in coverages)
    # Rounded before: a whole number of steps is none more for an error in the last digit.
    steps = math.ceil(round(math.log(most / least, _STEP), 6))
    return [least * _STEP**step for step in range(-1, steps + 2)]


def best_scale(loss: Callable[[float], float], scales: Sequence[float]) -> float:
    """The scale with the least loss, from three neighbours around it; at an end of ``scales``, that end.

    Args:
        loss: of the full model at a scale; called for each of ``scales``, for an early training has several minima.
        scales: equal steps on a logarithmic scale.
    """
    found = [loss(scale) for scale in scales]
    losses = [math.inf, *(value if math.isfinite(value) else math.inf for value in found), math.inf]
    middle = min(range(1, len(scales) + 1), key=lambda place: losses[place])
    below, here, above = losses[middle - 1 : middle + 2]
    bend = below - 2 * here + above
    vertex = (below - above) / (2 * bend) if 0 < bend < math.inf else 0.0
    return float(scales[middle - 1] * _STEP**vertex)


def halves(batches: Iterable[Batch], task: Task) -> tuple[list[Batch], list[Batch], int]:
    """Collective. Every other sample of all ranks, the others, and how many there are.

    Samples count in the order in which a step deals them, micro-batch by micro-batch over all ranks, so that the
    halves are the same on any number of ranks. Those with nothing to predict are left out. A batch that cannot be
    cut into samples, as not all of its tensors begin with their number, counts as one.
    """
    mine = [(batch, _samples(batch, task)) for batch in batches]
    counts: list[list[int]] = gather_objects([len(samples) for _, samples in mine], "halving the samples")
    found: tuple[list[Batch], list[Batch]] = ([], [])
    for number, (batch, samples) in enumerate(mine):
        first = sum(sum(ranks[:number]) for ranks in counts)
        first += sum(ranks[number] for ranks in counts[: dist.get_rank()] if number < len(ranks))
        for parity, half in enumerate(found):
            rows = [row for place, row in enumerate(samples, first) if place % 2 == parity]
            if rows:
                half.append(_part(batch, rows))
    return *found, sum(map(sum, counts))


def _samples(batch: Batch, task: Task) -> list[int | None]:
    """Rows of a batch with something to predict; ``None``: the batch as it is."""
    has_targets = task.has_targets(batch)
    if any(not value.ndim or len(value) != len(has_targets) for value in batch.values()):
        return [None] if has_targets.any() else []
    return list(has_targets.nonzero().flatten().tolist())


def _part(batch: Batch, rows: list[int | None]) -> Batch:
    return batch if rows == [None] else {name: value[rows] for name, value in batch.items()}


def _warn(message: str) -> None:
    if dist.get_rank() == 0:
        log.warning(message)
