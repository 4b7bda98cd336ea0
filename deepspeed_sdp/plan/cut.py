"""Cutting a unit space into chunks, one for each owner set of its class, or unit by unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepspeed_sdp.plan.capacity import Arrangement
from deepspeed_sdp.plan.designs.windows import Windows
from deepspeed_sdp.plan.units import OwnerSet, UnitSpace

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
        self.load = np.zeros(num_workers)
        self.uses: Counter[OwnerSet] = Counter()

    def ranks(self, ring: Windows) -> list[tuple[float, int]]:
        """Sorts first the set whose workers own the least, among equals the one used least: that keeps on mixing."""
        loads = self.load[ring.members].sum(axis=1).tolist()
        return [(load, self.uses[owners]) for load, owners in zip(loads, ring.owner_sets, strict=True)]

    def add(self, cut: Cut) -> Cut:
        """Counts a cut, and returns it."""
        for size, owners in zip(cut.sizes, cut.owners, strict=True):
            self.uses[owners] += 1
            self.load[list(owners)] += size * cut.space.unit_cost
        return cut


def cut_evenly(space: UnitSpace, ring: Windows, tally: Tally, chunk_multiple: int) -> Cut:
    """One chunk for each set of the class, as equal as the alignment allows; needs as many units as sets."""
    num_sets = len(ring.owner_sets)
    multiple = _alignment(space.num_units, num_sets, chunk_multiple)
    blocks = -(-space.num_units // multiple)
    missing = blocks * multiple - space.num_units
    ranks = tally.ranks(ring)
    enlarged = least_loaded_run(ring, blocks % num_sets, ranks)
    sizes = [blocks // num_sets * multiple] * num_sets
    for i in enlarged:
        sizes[i] += multiple
    last = num_sets - 1
    if missing:
        # The chunk with the incomplete block must stand last, or the borders after it are not aligned.
        last = max(enlarged or range(num_sets), key=lambda i: (ranks[i], -i))
        sizes[last] -= missing
    order = [*range(last + 1, num_sets), *range(last + 1)]
    owners = [ring.owner_sets[i] for i in order]
    return tally.add(Cut(space, [sizes[i] for i in order], owners, multiple, equal_shares(ring)))


def cut_by_unit(space: UnitSpace, owner_sets: Sequence[OwnerSet], shares: Sequence[float], tally: Tally) -> Cut:
    """One unit to each of the owner sets; those that are equal are put together."""
    counts = Counter(owner_sets)
    return tally.add(Cut(space, list(counts.values()), list(counts), 1, shares, adjustable=False))


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
        stop = min(space.num_units, round(border * space.num_units / multiple) * multiple)
        stop = space.num_units if border == 1.0 else stop
        if stop > at:
            sizes.append(stop - at)
            owners.append(owner_set)
            at = stop
    return tally.add(Cut(space, sizes, owners, multiple, shares))


def equal_shares(ring: Windows) -> tuple[float, ...]:
    """`K / N` for every worker."""
    return (ring.size / len(ring.order),) * len(ring.order)


def least_loaded_run(ring: Windows, count: int, ranks: Sequence[tuple[float, int]]) -> list[int]:
    """Indices of `count` windows that cover all workers equally often, within one, those with most to do less often.

    Of teams any will do. Else whole laps and a run of one more, which leaves no worker out twice.
    """
    if ring.per_worker == 1:
        return sorted(range(len(ranks)), key=lambda i: (ranks[i], i))[:count]
    whole, part = divmod(count, len(ring.laps[0]))
    if not part:
        return [i for lap in ring.laps[:whole] for i in lap]
    candidates = []
    for number, lap in enumerate(ring.laps):
        for first in range(len(lap)):
            run = (lap[first:] + lap[:first])[:part]
            candidates.append((sum(ranks[i][0] for i in run), sum(ranks[i][1] for i in run), number, run))
    _, _, number, run = min(candidates)
    others = [ring.laps[(number + 1 + i) % len(ring.laps)] for i in range(whole)]
    return run + [i for lap in others for i in lap]


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
