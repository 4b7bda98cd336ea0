"""How many owners the units of each kind have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.designs import check_workers
from deepspeed_sdp.plan.units import UnitSpace

OwnersPerUnit = int | Mapping[str, int]
"""`K`, or `K` for every kind of unit."""


def resolve_owners(spaces: Sequence[UnitSpace], num_subnetworks: int, owners_per_unit: OwnersPerUnit) -> dict[str, int]:
    """`K` for every kind that the spaces have, kinds in alphabetic order.

    Raises:
        PlanError: for `K` outside `1 … N`, and for a mapping that lacks a kind or has one that no space has.
    """
    kinds = sorted({space.kind for space in spaces})
    if not isinstance(owners_per_unit, Mapping):
        check_workers(num_subnetworks, owners_per_unit)
        return dict.fromkeys(kinds, owners_per_unit)
    unknown = sorted(str(kind) for kind in owners_per_unit if kind not in kinds)
    if unknown or len(owners_per_unit) < len(kinds):
        raise PlanError(
            f"owners_per_unit: got {sorted(map(str, owners_per_unit))}, takes one number for each kind of unit space: "
            f"{', '.join(kinds)}"
        )
    for kind in kinds:
        check_workers(num_subnetworks, owners_per_unit[kind], f"owners_per_unit[{kind!r}]")
    return {kind: owners_per_unit[kind] for kind in kinds}


def simplify_owners(owners: Mapping[str, int]) -> int | dict[str, int]:
    """One number where all kinds have the same, else a dict."""
    numbers = set(owners.values())
    return numbers.pop() if len(numbers) == 1 else dict(owners)
