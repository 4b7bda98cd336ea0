"""From unit spaces to a plan."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.assignment import assign_by_capacity, assign_by_design
from deepspeed_sdp.plan.capacity import capacity_shares, check_capacity
from deepspeed_sdp.plan.chunks import Chunk, PlannedSpace
from deepspeed_sdp.plan.coverage import OwnersPerUnit, resolve_owners, simplify_owners
from deepspeed_sdp.plan.cutting import Cut, Tally
from deepspeed_sdp.plan.designs import DESIGN_NAMES, check_at_least_one, check_workers
from deepspeed_sdp.plan.guarantees import check_non_negative, check_space
from deepspeed_sdp.plan.leveling import level
from deepspeed_sdp.plan.subnetwork_plan import SubnetworkPlan
from deepspeed_sdp.plan.units import UnitSpace


def make_plan(
    spaces: Sequence[UnitSpace],
    num_subnetworks: int,
    *,
    owners_per_unit: OwnersPerUnit,
    design: str = "auto",
    max_owner_sets: int = 64,
    chunk_multiple: int = 64,
    seed: int = 0,
    shared_flops: float = 0.0,
    worker_capacity: Sequence[float] | None = None,
) -> SubnetworkPlan:
    """Decides which workers own which units. The same arguments give the same plan in every process.

    The parallel classes of the design go over the spaces in turn. Within a space every owner set gets one chunk; where
    the units do not divide evenly, the larger chunks (or, with fewer units than owner sets, the only ones) go to the
    workers that have the least to do so far. In the end chunk borders of spaces with many units move until the workers'
    FLOPs are level.

    Args:
        spaces: what can be partitioned, in the order of the model.
        num_subnetworks: `N`, at least 1.
        owners_per_unit: `K`, from 1 to `N`, or a mapping with a `K` for every kind of space, as
            `{"mlp": 4, "attention": 6}`. Where it is `N`, nothing is partitioned.
        design: `"auto"` (what mixes best: resolvable, complement, weighted or developed designs), `"cyclic"` or
            `"random"`.
        max_owner_sets: bound on the owner sets of partitioned units; each becomes a process group.
        chunk_multiple: chunk borders are multiples of this many units; halved, down to 1, for a space in which owner
            sets would otherwise get no chunk or unequal ones.
        seed: of the random and the searched designs.
        shared_flops: training FLOPs per token that every worker computes besides its units (embeddings, head, norms).
        worker_capacity: relative speeds of the workers. Each then owns units in proportion to it, at most all of
            them, instead of equally many. The design must be `"auto"`.

    Raises:
        PlanError: for values outside these ranges, no spaces, spaces of the same name or without units, and when no
            design connects the workers or fits into `max_owner_sets`.
    """
    check_at_least_one("num_subnetworks", num_subnetworks)
    if not spaces:
        check_workers(num_subnetworks, 1)
        raise PlanError("spaces: got none, takes at least one unit space")
    owners = resolve_owners(spaces, num_subnetworks, owners_per_unit)
    check_at_least_one("max_owner_sets", max_owner_sets)
    check_at_least_one("chunk_multiple", chunk_multiple)
    check_non_negative("shared_flops", shared_flops)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(f"seed: got {seed!r}, takes an integer")
    if design not in DESIGN_NAMES:
        raise PlanError(f"design: got {design!r}, takes one of {', '.join(map(repr, DESIGN_NAMES))}")
    seen: set[str] = set()
    for space in spaces:
        check_space(space, seen)
    capacity = None if worker_capacity is None else check_capacity(worker_capacity, num_subnetworks)
    if capacity is not None and design != "auto":
        raise PlanError(f"worker_capacity: works with design='auto', got design={design!r}")

    def assemble(wanted: str) -> SubnetworkPlan:
        tally = Tally(num_subnetworks)
        cuts: dict[str, Cut] = {}
        names = set()
        budget = _Budget(num_subnetworks, set(owners.values()), max_owner_sets)
        for k in sorted(set(owners.values()), reverse=True):
            group = [space for space in spaces if owners[space.kind] == k]
            limit = budget.take(k)
            if capacity is not None and k < num_subnetworks:
                shares = capacity_shares(capacity, num_subnetworks, k)
                name, made = "arcs", assign_by_capacity(group, shares, limit, chunk_multiple, seed, tally)
            else:
                name, made = assign_by_design(group, num_subnetworks, k, wanted, limit, chunk_multiple, seed, tally)
            names.add(name)
            budget.give_back(len({s for cut in made for s in cut.owners}) if k < num_subnetworks else 0)
            cuts.update((cut.space.name, cut) for cut in made)
        ordered = [cuts[space.name] for space in spaces]
        _level(ordered, shared_flops, num_subnetworks)
        index = _index_owner_sets(ordered, num_subnetworks)
        return SubnetworkPlan(
            num_subnetworks=num_subnetworks,
            owners_per_unit=simplify_owners(owners),
            design="+".join(sorted(names - {"dense"} or names)),
            seed=seed,
            chunk_multiple=chunk_multiple,
            owner_sets=tuple(index),
            spaces=tuple(_planned(cut, index) for cut in ordered),
            shared_flops=float(shared_flops),
            worker_capacity=capacity,
        )

    plan = assemble(design)
    if design == "auto" and capacity is None and min(owners.values()) > 1 and not plan.connected:
        try:
            plan = assemble("cyclic")
        except PlanError as error:
            raise PlanError(f"{len(spaces)} unit space(s) are too few for a {plan.design} design; {error}") from error
    plan.validate(max_owner_sets)
    return plan


class _Budget:
    """Deals `max_owner_sets` to the kinds of different coverage: an equal part each, and what the others left over."""

    def __init__(self, num_workers: int, numbers: set[int], max_owner_sets: int) -> None:
        self.partitioned = {k for k in numbers if k < num_workers}
        self.left = max_owner_sets

    def take(self, k: int) -> int:
        if k not in self.partitioned:
            return self.left
        self.partitioned.discard(k)
        return max(1, self.left // (len(self.partitioned) + 1))

    def give_back(self, used: int) -> None:
        self.left -= used


def _level(cuts: Sequence[Cut], shared_flops: float, num_workers: int) -> None:
    targets = [0.0] * num_workers
    for cut in cuts:
        for worker, share in enumerate(cut.shares):
            targets[worker] += share * cut.space.num_units * cut.space.unit_cost
    level(cuts, targets, shared_flops)


def _index_owner_sets(cuts: Sequence[Cut], num_workers: int) -> dict[tuple[int, ...], int]:
    everyone = tuple(range(num_workers))
    used = {owners for cut in cuts for owners in cut.owners} - {everyone}
    return {everyone: 0, **{owners: i + 1 for i, owners in enumerate(sorted(used))}}


def _planned(cut: Cut, index: dict[tuple[int, ...], int]) -> PlannedSpace:
    chunks, at = [], 0
    for size, owners in zip(cut.sizes, cut.owners, strict=True):
        chunks.append(Chunk(at, at + size, index[owners]))
        at += size
    return PlannedSpace(cut.space, tuple(chunks))
