"""Whether the owners of a unit still hold the same weights."""

from collections import defaultdict
from typing import Any

import torch

from deepspeed_sdp.errors import ConsistencyError
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.subnetwork import Fragment, Subnetwork

_PIECE = 1 << 20
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@torch.no_grad()
def check_owners(subnetwork: Subnetwork, step: int) -> None:
    """Collective. Compare a checksum of every parameter of this rank with its other holders'; bit-equal passes.

    Those who hold one are its owners, and under backward masking all ranks.

    One pass over the weights and one exchange of an integer per parameter; only if some differ are units compared.

    Raises:
        ConsistencyError: on every rank, naming the parameter, the first unit, the ranks and the step.
    """
    parameters = [(name, p) for name, p in subnetwork.module.named_parameters() if name not in subnetwork.views]
    mine = {subnetwork.fragments[name]: p for name, p in parameters}
    sums = torch.stack([_checksum(p) for p in mine.values()]).tolist()
    reports = gather_objects(dict(zip(mine, sums, strict=True)), "comparing the owners' weights")
    different = _differing(reports)
    if not different:
        return
    # The first in forward order; equal on all ranks, as is everything it is chosen from.
    order = {name: place for place, name in enumerate(subnetwork.full_order)}
    worst = min(different, key=lambda fragment: (order[fragment.full_name], fragment.start))
    units = None
    if worst in mine:
        value = mine[worst].detach()
        if worst.dim is not None:
            value = value.reshape(subnetwork.partitioned[worst.full_name].fragment_shape(worst))
        units = _checksums(value, worst.dim).tolist()
    by_unit = gather_objects(units, "comparing the owners' weights")
    raise ConsistencyError(_describe(subnetwork, worst, by_unit, step, len(different)))


def _checksum(value: torch.Tensor) -> torch.Tensor:
    """Integer checksum of all bits; a piece at a time, for an integer copy of an embedding is eight times as large."""
    pieces = torch.split(value.detach().reshape(-1), _PIECE)
    sums = torch.stack([_checksums(piece, None).sum() for piece in pieces])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def _checksums(value: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Integer checksums ``[size of dim]`` of the bits, or ``[1]``: position-weighted sums modulo 2**64."""
    bits = value.detach().contiguous().view(_INTEGERS[value.element_size()])
    rows = bits.movedim(dim, 0).reshape(bits.shape[dim], -1) if dim is not None else bits.reshape(1, -1)
    # Odd weights: a change of any one element changes the sum.
    weights = torch.arange(1, 2 * rows.shape[1], 2, device=value.device, dtype=torch.int64)
    return (rows.to(torch.int64) * weights).sum(dim=1)


def _differing(reports: list[dict[Fragment, int]]) -> list[Fragment]:
    seen: defaultdict[Fragment, set[int]] = defaultdict(set)
    for report in reports:
        for fragment, checksum in report.items():
            seen[fragment].add(checksum)
    return [fragment for fragment, checksums in seen.items() if len(checksums) > 1]


def _describe(subnetwork: Subnetwork, fragment: Fragment, by_unit: list[Any], step: int, count: int) -> str:
    held = {rank: units for rank, units in enumerate(by_unit) if units is not None}
    reference = next(iter(held.values()))
    feature = next(i for i in range(len(reference)) if len({units[i] for units in held.values()}) > 1)
    width = 1
    if fragment.full_name in subnetwork.partitioned:
        width = subnetwork.partitioned[fragment.full_name].features_per_unit
    majority: defaultdict[int, list[int]] = defaultdict(list)
    for rank, units in held.items():
        majority[units[feature]].append(rank)
    camps = " and ".join(f"rank(s) {', '.join(map(str, ranks))}" for ranks in majority.values())
    where = f"unit {(fragment.start + feature) // width} of " if fragment.dim is not None else ""
    more = f" ({count - 1} more parameters differ)" if count > 1 else ""
    return f"step {step}: ranks hold different weights: {where}{fragment.full_name} on {camps}{more}"
