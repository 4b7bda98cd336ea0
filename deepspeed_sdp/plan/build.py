"""From unit spaces to a plan: cutting every space into the chunks of its parallel class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import gcd

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.chunks import Chunk, PlannedSpace
from deepspeed_sdp.plan.classes import OwnerSet, ParallelClass, rings, sets_per_worker
from deepspeed_sdp.plan.designs import DESIGN_NAMES, Design, check_at_least_one, check_workers, make_design
from deepspeed_sdp.plan.subnetwork_plan import SubnetworkPlan, check_space
from deepspeed_sdp.plan.units import UnitSpace

# Chunks of a space may differ by this share of their mean before a finer alignment is taken.
_SIZE_TOLERANCE = 0.02


def make_plan(
    spaces: Sequence[UnitSpace],
    num_subnetworks: int,
    *,
    owners_per_unit: int,
    design: str = "auto",
    max_owner_sets: int = 64,
    chunk_multiple: int = 64,
    seed: int = 0,
) -> SubnetworkPlan:
    """Decides which workers own which units. The same arguments give the same plan in every process.

    The parallel classes of the design go over the spaces in turn. Within a space every owner set gets one chunk; where
    the units do not divide evenly, the larger chunks (or, with fewer units than owner sets, the only ones) go to the
    workers that own the least so far.

    Args:
        spaces: what can be partitioned, in the order of the model.
        num_subnetworks: `N`, at least 1.
        owners_per_unit: `K`, from 1 to `N`; `K = N` partitions nothing.
        design: `"auto"` (resolvable if `K` divides `N` and that connects the workers, else cyclic), `"cyclic"` or
            `"random"`.
        max_owner_sets: bound on the owner sets of partitioned units; each becomes a process group.
        chunk_multiple: chunk borders are multiples of this many units; halved, down to 1, for a space in which owner
            sets would otherwise get no chunk or unequal ones.
        seed: of the random and the searched designs.

    Raises:
        PlanError: for values outside these ranges, no spaces, spaces of the same name or without units, and when no
            design connects the workers or fits into `max_owner_sets`.
    """
    check_workers(num_subnetworks, owners_per_unit)
    check_at_least_one("max_owner_sets", max_owner_sets)
    check_at_least_one("chunk_multiple", chunk_multiple)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(f"seed: got {seed!r}, takes an integer")
    if design not in DESIGN_NAMES:
        raise PlanError(f"design: got {design!r}, takes one of {', '.join(map(repr, DESIGN_NAMES))}")
    if not spaces:
        raise PlanError("spaces: got none, takes at least one unit space")
    seen: set[str] = set()
    for space in spaces:
        check_space(space, seen)

    chosen = make_design(design, num_subnetworks, owners_per_unit, max_owner_sets=max_owner_sets, seed=seed)
    plan = _assemble(spaces, chosen, chunk_multiple, seed)
    if chosen.name == "resolvable" and owners_per_unit > 1 and not plan.connected:
        try:
            windows = make_design("cyclic", num_subnetworks, owners_per_unit, max_owner_sets=max_owner_sets)
        except PlanError as error:
            raise PlanError(f"{len(spaces)} unit space(s) are too few for a resolvable design; {error}") from error
        plan = _assemble(spaces, windows, chunk_multiple, seed)
    plan.validate(max_owner_sets)
    return plan


class _Tally:
    """What has been given out so far: parameters per worker, chunks per owner set."""

    def __init__(self, num_workers: int) -> None:
        self.load = [0] * num_workers
        self.uses: Counter[OwnerSet] = Counter()

    def rank(self, owner_set: OwnerSet) -> tuple[int, int]:
        """Sorts first the set whose workers own the least, among equals the one used least: that keeps on mixing."""
        return sum(self.load[worker] for worker in owner_set), self.uses[owner_set]

    def add(self, owner_set: OwnerSet, numel: int) -> None:
        self.uses[owner_set] += 1
        for worker in owner_set:
            self.load[worker] += numel


def _assemble(spaces: Sequence[UnitSpace], design: Design, chunk_multiple: int, seed: int) -> SubnetworkPlan:
    everyone = tuple(range(design.num_subnetworks))
    index = {everyone: 0}
    if design.name == "dense":
        planned = [PlannedSpace(space, (Chunk(0, space.num_units, 0),)) for space in spaces]
    else:
        tally = _Tally(design.num_subnetworks)
        classes = _rotate(design.classes, spaces)
        cuts = [_cut(space, c, tally, chunk_multiple) for space, c in zip(spaces, classes, strict=True)]
        used = {owners for cut in cuts for _, _, owners in cut}
        index.update((owners, i + 1) for i, owners in enumerate(sorted(used)))
        planned = [
            PlannedSpace(space, tuple(Chunk(start, stop, index[owners]) for start, stop, owners in cut))
            for space, cut in zip(spaces, cuts, strict=True)
        ]
    return SubnetworkPlan(
        num_subnetworks=design.num_subnetworks,
        owners_per_unit=design.owners_per_unit,
        design=design.name,
        seed=seed,
        chunk_multiple=chunk_multiple,
        owner_sets=tuple(index),
        spaces=tuple(planned),
    )


def _rotate(classes: tuple[ParallelClass, ...], spaces: Sequence[UnitSpace]) -> list[ParallelClass]:
    """The class of every space: one after the other.

    A space with fewer units than its class has owner sets leaves some workers out: the next spaces of its kind then
    stay with the class until every set had its turn, which is what balances whole blocks and a few KV heads.

    With, say, ten classes and attention and MLP in turn, attention would only ever meet the even ones; then each round
    over the classes starts one further.
    """
    count = len(classes)
    drift = int(gcd(count, len({space.kind for space in spaces})) > 1)
    turn = 0
    waiting: dict[str, tuple[ParallelClass, int]] = {}
    chosen = []
    for space in spaces:
        parallel_class, sets_left = waiting.pop(space.kind, (None, 0))
        if parallel_class is None:
            parallel_class = classes[(turn + drift * (turn // count)) % count]
            sets_left = len(parallel_class)
            turn += 1
        chosen.append(parallel_class)
        if space.num_units < sets_left:
            waiting[space.kind] = parallel_class, sets_left - space.num_units
    return chosen


def _cut(
    space: UnitSpace, parallel_class: ParallelClass, tally: _Tally, chunk_multiple: int
) -> list[tuple[int, int, OwnerSet]]:
    """`(start, stop, owners)` of the chunks of one space; adds them to the tally."""
    num_sets = len(parallel_class)
    multiple = _alignment(space.num_units, num_sets, chunk_multiple)
    blocks = -(-space.num_units // multiple)
    missing = blocks * multiple - space.num_units
    enlarged = _least_loaded_run(parallel_class, blocks % num_sets, tally)
    sizes = [blocks // num_sets * multiple] * num_sets
    for i in enlarged:
        sizes[i] += multiple
    last = num_sets - 1
    if missing:
        # The chunk with the incomplete block must stand last, or the borders after it are not aligned.
        last = max(enlarged or range(num_sets), key=lambda i: (tally.rank(parallel_class[i]), -i))
        sizes[last] -= missing
    cut, at = [], 0
    for i in [*range(last + 1, num_sets), *range(last + 1)]:
        if sizes[i]:
            cut.append((at, at + sizes[i], parallel_class[i]))
            at += sizes[i]
    for start, stop, owners in cut:
        tally.add(owners, (stop - start) * space.unit_numel)
    return cut


def _alignment(num_units: int, num_sets: int, chunk_multiple: int) -> int:
    """The largest of `chunk_multiple`, its half, … 1 with a chunk for every set and sizes within the tolerance.

    Where no multiple reaches the tolerance: the one with the most equal sizes.
    """
    multiples = [chunk_multiple]
    while multiples[-1] > 1:
        multiples.append(multiples[-1] // 2)
    if num_units < num_sets:
        return 1

    def unevenness(multiple: int) -> float:
        blocks = -(-num_units // multiple)
        if blocks < num_sets:
            return float("inf")
        extra = blocks % num_sets
        missing = blocks * multiple - num_units
        if extra == 1:
            spread = multiple - missing
        elif extra:
            spread = multiple
        else:
            spread = missing
        return max(spread * num_sets / num_units, _SIZE_TOLERANCE)

    return min(multiples, key=lambda multiple: (unevenness(multiple), -multiple))


def _least_loaded_run(parallel_class: ParallelClass, count: int, tally: _Tally) -> list[int]:
    """Indices of `count` sets of the class that cover all workers equally often within one, the fuller workers less.

    Whole rings cover everyone alike. Of one more ring a part is taken: disjoint teams in any choice, overlapping
    windows in a run, which leaves no worker out twice.
    """
    num_workers, size = len(tally.load), len(parallel_class[0])
    all_rings = rings(len(parallel_class), sets_per_worker(parallel_class, num_workers))
    whole, part = divmod(count, len(all_rings[0]))
    rank = [tally.rank(owners) for owners in parallel_class]
    disjoint = len(all_rings[0]) * size == num_workers
    candidates = []
    for number, ring in enumerate(all_rings):
        if disjoint:
            runs = [sorted(ring, key=lambda i: (rank[i], i))[:part]]
        else:
            runs = [(ring[first:] + ring[:first])[:part] for first in range(len(ring))]
        for run in runs:
            load, uses = sum(rank[i][0] for i in run), sum(rank[i][1] for i in run)
            candidates.append((load, uses, number, run))
    _, _, number, run = min(candidates)
    others = [all_rings[(number + 1 + i) % len(all_rings)] for i in range(whole)]
    return run + [i for ring in others for i in ring]
