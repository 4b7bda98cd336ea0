"""From unit spaces to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.capacity import arrangements, arrangements_for, capacity_shares, check_capacity, units_in_turn
from deepspeed_sdp.plan.checks import OwnersPerUnit, check_non_negative, check_space, resolve_owners
from deepspeed_sdp.plan.cut import Cut, Tally, cut_by_arcs, cut_by_unit, cut_evenly, equal_shares
from deepspeed_sdp.plan.designs import DESIGN_NAMES, Design, check_at_least_one, check_workers, make_design
from deepspeed_sdp.plan.designs.windows import Windows
from deepspeed_sdp.plan.level import level
from deepspeed_sdp.plan.plan import SubnetworkPlan
from deepspeed_sdp.plan.units import Chunk, OwnerSet, PlannedSpace, UnitSpace

# With this many units per arc, rounding to whole units is left to the leveling.
_UNITS_PER_ARC = 4
# The most arrangements of the workers by capacity: each adds up to N owner sets.
_MAX_ARRANGEMENTS = 8


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

    The classes of the design go over the spaces in turn. Within a space every owner set gets one chunk; where the units
    do not divide evenly, the larger chunks (or, with fewer units than owner sets, the only ones) go to the workers that
    have the least to do so far. In the end chunk borders of spaces with many units move until the workers' FLOPs are
    level.

    Args:
        spaces: what can be partitioned, in the order of the model.
        num_subnetworks: `N`, at least 1.
        owners_per_unit: `K`, from 1 to `N`, or a mapping with a `K` for every kind of space, as
            `{"mlp": 4, "attention": 6}`. Where it is `N`, nothing is partitioned.
        design: `"auto"` (searched so that all workers meet equally often; windows where the spaces are too few for it
            to connect them), `"cyclic"` or `"random"`.
        max_owner_sets: bound on the owner sets of partitioned units; each becomes a process group.
        chunk_multiple: chunk borders are multiples of this many units; halved, down to 1, for a space in which owner
            sets would otherwise get no chunk or unequal ones.
        seed: of the balanced and the random design.
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
        # Kinds of different coverage share the bound: an equal part each, and what the others left over.
        numbers, left = sorted(set(owners.values()), reverse=True), max_owner_sets
        for i, k in enumerate(numbers):
            group = [space for space in spaces if owners[space.kind] == k]
            limit = left if k == num_subnetworks else max(1, left // (len(numbers) - i))
            if capacity is not None and k < num_subnetworks:
                name = "arcs"
                shares = capacity_shares(capacity, num_subnetworks, k)
                made = _cut_by_capacity(group, shares, limit, chunk_multiple, seed, tally)
            else:
                found = make_design(wanted, num_subnetworks, k, max_owner_sets=limit, seed=seed)
                name, made = found.name, _cut_in_turn(group, found, tally, chunk_multiple)
            names.add(name)
            left -= len({s for cut in made for s in cut.owners}) if k < num_subnetworks else 0
            cuts.update((cut.space.name, cut) for cut in made)
        ordered = [cuts[space.name] for space in spaces]
        level(ordered, shared_flops)
        index = _index_owner_sets(ordered, num_subnetworks)
        return SubnetworkPlan(
            num_subnetworks=num_subnetworks,
            owners_per_unit=dict(owners) if len(numbers) > 1 else numbers[0],
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


def _cut_in_turn(spaces: Sequence[UnitSpace], design: Design, tally: Tally, chunk_multiple: int) -> list[Cut]:
    """Cuts every space by its class: one after the other.

    A space with fewer units than its class has owner sets leaves some workers out: the next such spaces of its kind
    then stay with the class until every set had its turn, which is what balances whole blocks and a few KV heads.

    With, say, ten classes and attention and MLP in turn, attention would only ever meet the even ones; then each round
    over the classes starts one further.
    """
    kinds = len({space.kind for space in spaces})
    turn = 0
    laps: dict[str, _Lap] = {}
    cuts = []

    def next_class(classes: Sequence[Windows]) -> Windows:
        nonlocal turn
        count = len(classes)
        drift = turn // count if gcd(count, kinds) > 1 else 0
        turn += 1
        return classes[(turn - 1 + drift) % count]

    for space in spaces:
        if space.num_units >= len(design.classes[0].owner_sets):
            cuts.append(cut_evenly(space, next_class(design.classes), tally, chunk_multiple))
        elif space.num_units >= len(design.classes_of_few[0].owner_sets):
            cuts.append(cut_evenly(space, next_class(design.classes_of_few), tally, chunk_multiple))
        else:
            if space.kind not in laps:
                laps[space.kind] = _Lap(next_class(design.classes_of_few))
            lap = laps[space.kind]
            cuts.append(cut_by_unit(space, lap.take(space.num_units, tally), equal_shares(lap.ring), tally))
            if not lap.left:
                del laps[space.kind]
    return cuts


class _Lap:
    """The owner sets of a class that have not had their turn, in an order in which any run of them covers evenly."""

    def __init__(self, ring: Windows) -> None:
        self.ring = ring
        (self.order,) = ring.laps
        self.left: list[int] = []

    def take(self, count: int, tally: Tally) -> list[OwnerSet]:
        """`count` sets, fewer than there are: those that are left, and the first ones of the next lap.

        Of teams any will do. Windows stay end to end, from the run on whose workers have had the least.
        """
        ranks = tally.ranks(self.ring)
        if not self.left:
            runs = [self.order[first:] + self.order[:first] for first in range(len(self.order))]
            self.order = self.left = min(runs, key=lambda run: sum(ranks[i][0] for i in run[:count]))

        def first_of(indices: list[int], number: int) -> list[int]:
            teams = self.ring.per_worker == 1
            return (sorted(indices, key=lambda i: (ranks[i], i)) if teams else indices)[:number]

        picked = first_of(self.left, count)
        self.left = [i for i in self.left if i not in picked]
        if len(picked) < count:
            more = first_of([i for i in self.order if i not in picked], count - len(picked))
            self.left = [i for i in self.order if i not in more]
            picked = picked + more
        return [self.ring.owner_sets[i] for i in picked]


def _cut_by_capacity(
    spaces: Sequence[UnitSpace],
    shares: Sequence[float],
    max_owner_sets: int,
    chunk_multiple: int,
    seed: int,
    tally: Tally,
) -> list[Cut]:
    """Cuts spaces so that worker `w` owns the fraction `shares[w]` of each."""
    found = arrangements(shares, max_owner_sets, min(_MAX_ARRANGEMENTS, len(spaces)), seed)
    pieces = max(len(arrangement.owners) for arrangement in found)
    cuts: list[Cut] = []
    many = [space for space in spaces if space.num_units >= _UNITS_PER_ARC * pieces]
    for i, space in enumerate(many):
        cuts.append(cut_by_arcs(space, found[i % len(found)], shares, tally, chunk_multiple))
    few = [space for space in spaces if space.num_units < _UNITS_PER_ARC * pieces]
    for kind in sorted({space.kind for space in few}):
        of_kind = [space for space in few if space.kind == kind]
        used = arrangements_for(sum(space.num_units for space in of_kind), len(found))
        for i in range(used):
            part = of_kind[i::used]
            sequence = units_in_turn(found[i], [space.num_units for space in part])
            cuts += [cut_by_unit(s, owner_sets, shares, tally) for s, owner_sets in zip(part, sequence, strict=True)]
    return cuts


def _index_owner_sets(cuts: Sequence[Cut], num_workers: int) -> dict[OwnerSet, int]:
    everyone = tuple(range(num_workers))
    used = {owners for cut in cuts for owners in cut.owners} - {everyone}
    return {everyone: 0, **{owners: i + 1 for i, owners in enumerate(sorted(used))}}


def _planned(cut: Cut, index: Mapping[OwnerSet, int]) -> PlannedSpace:
    chunks, at = [], 0
    for size, owners in zip(cut.sizes, cut.owners, strict=True):
        chunks.append(Chunk(at, at + size, index[owners]))
        at += size
    return PlannedSpace(cut.space, tuple(chunks))
