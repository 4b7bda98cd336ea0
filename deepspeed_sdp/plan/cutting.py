"""Cutting a unit space into chunks, one for each owner set of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from deepspeed_sdp.plan.capacity import Arrangement
from deepspeed_sdp.plan.classes import OwnerSet, ParallelClass, covers_evenly, rings, sets_per_worker
from deepspeed_sdp.plan.units import UnitSpace

# Chunks of a space may differ by this share of their mean before a finer alignment is taken.
_SIZE_TOLERANCE = 0.02


@dataclass
class Cut:
    """A space on its way into the plan: sizes and owners of its chunks, in order.

    Attributes:
        multiple: what the borders are multiples of.
        shares: the fraction of the units that each worker should own.
        adjustable: whether borders may still move to balance the workers.
    """

    space: UnitSpace
    sizes: list[int]
    owners: list[OwnerSet]
    multiple: int
    shares: Sequence[float]
    adjustable: bool = True

    def owned(self) -> list[int]:
        """Units of each worker."""
        owned = [0] * len(self.shares)
        for size, owners in zip(self.sizes, self.owners, strict=True):
            for worker in owners:
                owned[worker] += size
        return owned


class Tally:
    """What has been given out so far: FLOPs per worker, chunks per owner set."""

    def __init__(self, num_workers: int) -> None:
        self.load = [0.0] * num_workers
        self.uses: Counter[OwnerSet] = Counter()

    def rank(self, owner_set: OwnerSet) -> tuple[float, int]:
        """Sorts first the set whose workers own the least, among equals the one used least: that keeps on mixing."""
        return sum(self.load[worker] for worker in owner_set), self.uses[owner_set]

    def add(self, cut: Cut) -> None:
        for size, owners in zip(cut.sizes, cut.owners, strict=True):
            self.uses[owners] += 1
            for worker in owners:
                self.load[worker] += size * cut.space.unit_cost


def cut_evenly(space: UnitSpace, parallel_class: ParallelClass, tally: Tally, chunk_multiple: int) -> Cut:
    """One chunk for each set of the class, as equal as the alignment allows; needs as many units as sets."""
    num_sets = len(parallel_class)
    multiple = _alignment(space.num_units, num_sets, chunk_multiple)
    blocks = -(-space.num_units // multiple)
    missing = blocks * multiple - space.num_units
    enlarged = _enlarged(parallel_class, blocks % num_sets, tally)
    sizes = [blocks // num_sets * multiple] * num_sets
    for i in enlarged:
        sizes[i] += multiple
    last = num_sets - 1
    if missing:
        # The chunk with the incomplete block must stand last, or the borders after it are not aligned.
        last = max(enlarged or range(num_sets), key=lambda i: (tally.rank(parallel_class[i]), -i))
        sizes[last] -= missing
    order = [*range(last + 1, num_sets), *range(last + 1)]
    cut = Cut(
        space,
        [sizes[i] for i in order],
        [parallel_class[i] for i in order],
        multiple,
        _equal_shares(parallel_class, tally),
    )
    tally.add(cut)
    return cut


def cut_by_unit(space: UnitSpace, owner_sets: Sequence[OwnerSet], shares: Sequence[float], tally: Tally) -> Cut:
    """One unit to each of the owner sets; those that are equal are put together."""
    counts = Counter(owner_sets)
    cut = Cut(space, list(counts.values()), list(counts), 1, shares, adjustable=False)
    tally.add(cut)
    return cut


def cut_by_arcs(
    space: UnitSpace, arrangement: Arrangement, shares: Sequence[float], tally: Tally, chunk_multiple: int
) -> Cut:
    """Chunks in the proportion of the arrangement's pieces, as near as the alignment allows."""
    multiple = chunk_multiple
    while multiple > 1 and multiple > _SIZE_TOLERANCE * space.num_units:
        multiple //= 2
    sizes: list[int] = []
    owners: list[OwnerSet] = []
    at = 0
    for border, owner_set in zip(arrangement.borders, arrangement.owners, strict=True):
        stop = (
            space.num_units
            if border == 1.0
            else min(space.num_units, round(border * space.num_units / multiple) * multiple)
        )
        if stop > at:
            sizes.append(stop - at)
            owners.append(owner_set)
            at = stop
    cut = Cut(space, sizes, owners, multiple, shares)
    tally.add(cut)
    return cut


def _equal_shares(parallel_class: ParallelClass, tally: Tally) -> tuple[float, ...]:
    num_workers = len(tally.load)
    return (len(parallel_class[0]) / num_workers,) * num_workers


def _alignment(num_units: int, num_sets: int, chunk_multiple: int) -> int:
    """The largest of `chunk_multiple`, its half, … 1 with a chunk for every set and sizes within the tolerance.

    Where no multiple reaches the tolerance: the one with the most equal sizes.
    """
    multiples = [chunk_multiple]
    while multiples[-1] > 1:
        multiples.append(multiples[-1] // 2)

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


def _enlarged(parallel_class: ParallelClass, count: int, tally: Tally) -> list[int]:
    """Indices of `count` sets of the class that cover all workers as equally as can be, the fuller workers less."""
    num_workers = len(tally.load)
    if count == 0:
        return []
    step = sets_per_worker(parallel_class, num_workers)
    if covers_evenly(parallel_class, num_workers):
        order = sorted(range(len(parallel_class)), key=lambda i: (tally.rank(parallel_class[i]), i))
        return order[:count]
    if _runs_lie_end_to_end(parallel_class, num_workers):
        return _least_loaded_run(parallel_class, count, step, tally)
    rank = [tally.rank(owners) for owners in parallel_class]
    workers = np.array(parallel_class)
    covered = np.zeros(num_workers, dtype=np.int64)
    left = list(range(len(parallel_class)))
    chosen: list[int] = []
    for _ in range(count):
        cost = (covered[workers] ** 2 + 2 * covered[workers]).sum(axis=1).tolist()
        pick = min(left, key=lambda i: (cost[i], rank[i], i))
        left.remove(pick)
        chosen.append(pick)
        covered[workers[pick]] += 1
    return chosen


def coverage_spread(parallel_class: ParallelClass, count: int, num_workers: int) -> int:
    """How much more often one worker than another is in the `count` sets that would be enlarged."""
    covered = [0] * num_workers
    for i in _enlarged(parallel_class, count, Tally(num_workers)):
        for w in parallel_class[i]:
            covered[w] += 1
    return max(covered) - min(covered)


@lru_cache(maxsize=256)
def _runs_lie_end_to_end(parallel_class: ParallelClass, num_workers: int) -> bool:
    """Whether any run of sets of any ring of the class covers all workers equally often, within one."""
    member = np.zeros((len(parallel_class), num_workers), dtype=np.int64)
    for row, owners in enumerate(parallel_class):
        member[row, list(owners)] = 1
    for ring in rings(len(parallel_class), sets_per_worker(parallel_class, num_workers)):
        for first in range(len(ring)):
            covered = member[ring[first:] + ring[:first]].cumsum(axis=0)
            if np.any(covered.max(axis=1) - covered.min(axis=1) > 1):
                return False
    return True


def _least_loaded_run(parallel_class: ParallelClass, count: int, step: int, tally: Tally) -> list[int]:
    """Whole rings cover everyone alike. Of one more ring a run is taken, which leaves no worker out twice."""
    all_rings = rings(len(parallel_class), step)
    whole, part = divmod(count, len(all_rings[0]))
    rank = [tally.rank(owners) for owners in parallel_class]
    candidates = []
    for number, ring in enumerate(all_rings):
        for first in range(len(ring)):
            run = (ring[first:] + ring[:first])[:part]
            load, uses = sum(rank[i][0] for i in run), sum(rank[i][1] for i in run)
            candidates.append((load, uses, number, run))
    _, _, number, run = min(candidates)
    others = [all_rings[(number + 1 + i) % len(all_rings)] for i in range(whole)]
    return run + [i for ring in others for i in ring]
