"""What a plan is asked for, and its guarantees, checked one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.json_text import shown
from deepspeed_sdp.plan.capacity import check_capacity
from deepspeed_sdp.plan.designs import check_at_least_one, check_workers
from deepspeed_sdp.plan.units import PlannedSpace, UnitSpace

if TYPE_CHECKING:
    from deepspeed_sdp.plan.plan import SubnetworkPlan

OwnersPerUnit = int | Mapping[str, int]
"""`K`, or `K` for every kind of unit."""

# Due units of a worker are sums of floats.
_ROUNDING = 1e-6


def check(plan: SubnetworkPlan, max_owner_sets: int | None) -> None:
    """Raises PlanError naming the first guarantee that does not hold."""
    check_at_least_one("num_subnetworks", plan.num_subnetworks)
    if not plan.spaces:
        raise PlanError("spaces: got none, takes at least one unit space")
    owners = resolve_owners([planned.space for planned in plan.spaces], plan.num_subnetworks, plan.owners_per_unit)
    check_non_negative("shared_flops", plan.shared_flops)
    if plan.worker_capacity is not None:
        check_capacity(plan.worker_capacity, plan.num_subnetworks)
    _check_owner_sets(plan, set(owners.values()))
    seen: set[str] = set()
    for planned in plan.spaces:
        check_space(planned.space, seen)
        _check_cover(plan, planned, owners[planned.space.kind])
        _check_balance(plan, planned)
    _check_blocks(plan)
    unused = set(range(1, len(plan.owner_sets))) - plan.used_sets
    if unused:
        raise PlanError(f"owner_sets: no chunk uses set {min(unused)}, {list(plan.owner_sets[min(unused)])}")
    if max(owners.values()) > 1 and not plan.connected:
        raise PlanError(_describe_unconnected(plan))
    partitioned = len(plan.used_sets - {0}) or 1
    if max_owner_sets is not None and partitioned > max_owner_sets:
        raise PlanError(f"max_owner_sets: got {max_owner_sets}, and the plan has {partitioned} owner sets")


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


def check_space(space: UnitSpace, seen: set[str]) -> None:
    """Raises PlanError for a unit space without units or with a name that is in `seen`; adds its name there."""
    if space.name in seen:
        raise PlanError(f"spaces: got the name {space.name!r} twice, takes different names")
    seen.add(space.name)
    check_at_least_one(f"num_units of {space.name!r}", space.num_units)
    check_at_least_one(f"unit_numel of {space.name!r}", space.unit_numel)
    check_non_negative(f"unit_flops of {space.name!r}", space.unit_flops)


def check_non_negative(key: str, value: object) -> None:
    """Raises PlanError unless `value` is a finite number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise PlanError(f"{key}: got {value!r}, takes a number of 0 or more")


def _check_owner_sets(plan: SubnetworkPlan, numbers: set[int]) -> None:
    # First the length: a plan that says it has a billion workers has to list them.
    n = plan.num_subnetworks
    if not plan.owner_sets or len(plan.owner_sets[0]) != n or plan.owner_sets[0] != tuple(range(n)):
        raise PlanError(f"owner_sets: the first must hold all workers 0 to {n - 1}")
    for owners in plan.owner_sets[1:]:
        ascending = all(left < right for left, right in itertools.pairwise(owners))
        if len(owners) not in numbers or not ascending or owners[0] < 0 or owners[-1] >= n:
            takes = " or ".join(map(str, sorted(numbers)))
            raise PlanError(
                f"owner_sets: got {shown(owners)}, takes {takes} different workers in ascending order, 0 to {n - 1}"
            )
    if any(left >= right for left, right in zip(plan.owner_sets[1:], plan.owner_sets[2:], strict=False)):
        raise PlanError("owner_sets: those after the first must differ and stand in lexicographic order")


def _check_cover(plan: SubnetworkPlan, planned: PlannedSpace, owners_per_unit: int) -> None:
    name, at = planned.space.name, 0
    for chunk in planned.chunks:
        if chunk.start != at or chunk.stop <= chunk.start:
            raise PlanError(f"{name}: chunk [{chunk.start}, {chunk.stop}) does not continue at unit {at}")
        if not 0 <= chunk.owner_set < len(plan.owner_sets):
            raise PlanError(f"{name}: chunk of owner set {chunk.owner_set}, there are {len(plan.owner_sets)}")
        if len(plan.owner_sets[chunk.owner_set]) != owners_per_unit:
            raise PlanError(
                f"{name}: units [{chunk.start}, {chunk.stop}) have {len(plan.owner_sets[chunk.owner_set])} owners, "
                f"not owners_per_unit={owners_per_unit}"
            )
        at = chunk.stop
    if at != planned.space.num_units:
        raise PlanError(f"{name}: chunks cover {at} of {planned.space.num_units} units")


def _check_balance(plan: SubnetworkPlan, planned: PlannedSpace) -> None:
    owned = _owned_units(plan, planned)
    chunk_size = max(chunk.stop - chunk.start for chunk in planned.chunks)
    if plan.worker_capacity is None:
        if max(owned) - min(owned) > chunk_size:
            raise PlanError(
                f"{planned.space.name}: workers own from {min(owned)} to {max(owned)} units, further apart than "
                f"one chunk ({chunk_size} units)"
            )
        return
    for worker, share in enumerate(plan.shares(planned.space.kind)):
        due = share * planned.space.num_units
        if abs(owned[worker] - due) > chunk_size + _ROUNDING:
            raise PlanError(
                f"{planned.space.name}: worker {worker} owns {owned[worker]} units and {due:g} are due to it by "
                f"worker_capacity, further apart than one chunk ({chunk_size} units)"
            )


def _check_blocks(plan: SubnetworkPlan) -> None:
    """Spaces of one unit can only be balanced together: over all of a kind, within one unit."""
    if plan.worker_capacity is not None:
        return
    blocks: dict[str, list[int]] = {}
    for planned in plan.spaces:
        if planned.space.num_units == 1:
            total = blocks.setdefault(planned.space.kind, [0] * plan.num_subnetworks)
            for worker, units in enumerate(_owned_units(plan, planned)):
                total[worker] += units
    for kind, total in blocks.items():
        if max(total) - min(total) > 1:
            raise PlanError(f"kind {kind!r}: workers own from {min(total)} to {max(total)} blocks, more than one apart")


def _owned_units(plan: SubnetworkPlan, planned: PlannedSpace) -> list[int]:
    units: dict[int, int] = {}
    for chunk in planned.chunks:
        units[chunk.owner_set] = units.get(chunk.owner_set, 0) + chunk.stop - chunk.start
    owned = [0] * plan.num_subnetworks
    for owner_set, number in units.items():
        for worker in plan.owner_sets[owner_set]:
            owned[worker] += number
    return owned


def _describe_unconnected(plan: SubnetworkPlan) -> str:
    groups = plan.components()
    units = sum(planned.space.num_units for planned in plan.spaces)
    shown = ", ".join(str(list(group)) for group in groups[:4]) + (", …" if len(groups) > 4 else "")
    return (
        f"num_subnetworks={plan.num_subnetworks}, owners_per_unit={plan.owners_per_unit}: with the {plan.design} "
        f"design the workers fall into groups that share no partitioned unit, {shown}. {len(plan.spaces)} unit "
        f"space(s) with {units} units are too few: partition more layers or finer units, or take a larger "
        f"owners_per_unit or owners_per_unit={plan.num_subnetworks} (data parallelism)"
    )
