"""Workers of unequal speed: how much each one owns, and owner sets that give it to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, isfinite
from random import Random

import numpy as np

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.gap import spectral_gap
from deepspeed_sdp.plan.units import OwnerSet

# Orders of the workers drawn for every arrangement; the one that mixes best is taken.
_DRAWS = 12
# Arcs shorter than this share of a space are rounding errors of the sums.
_SHORTEST = 1e-9
# Fewer units than this per arrangement would round a worker's share too coarsely.
_UNITS_PER_ARRANGEMENT = 32
_DIGITS = 7


@dataclass(frozen=True)
class Arrangement:
    """The workers' arcs laid end to end around a circle `K` times: position `x` in [0, 1) belongs to the arcs over it.

    Every position lies under exactly `K` arcs, none of them longer than the circle, so each has another worker.

    Attributes:
        borders: ascending, the ends of the pieces with the same owners; the last one is 1.
        owners: of each piece. At most `N` pieces.
    """

    borders: tuple[float, ...]
    owners: tuple[OwnerSet, ...]

    def at(self, position: float) -> OwnerSet:
        """The owners of a position in [0, 1)."""
        return next(s for border, s in zip(self.borders, self.owners, strict=True) if position < border)


def check_capacity(worker_capacity: Sequence[float], num_workers: int) -> tuple[float, ...] | None:
    """The capacities as floats; None if all are equal.

    Raises:
        PlanError: for a wrong number of them and for values that are no positive number.
    """
    if isinstance(worker_capacity, str) or not isinstance(worker_capacity, Sequence):
        raise PlanError(f"worker_capacity: got {worker_capacity!r}, takes a list of {num_workers} positive numbers")
    if len(worker_capacity) != num_workers:
        raise PlanError(
            f"worker_capacity: got {len(worker_capacity)} values, takes one for each of the {num_workers} subnetworks"
        )
    for worker, value in enumerate(worker_capacity):
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            raise PlanError(
                f"worker_capacity: got {value!r} for worker {worker}, takes positive numbers; leave a worker that "
                f"should do nothing out and take num_subnetworks={num_workers - 1}"
            )
    capacity = tuple(float(value) for value in worker_capacity)
    return None if len(set(capacity)) == 1 else capacity


def capacity_shares(capacity: Sequence[float] | None, num_workers: int, owners_per_unit: int) -> tuple[float, ...]:
    """The fraction of the units each worker owns: in proportion to capacity, at most 1, summing to `K`.

    What a worker of more than its fair share cannot own is spread over the others in the same proportion.
    """
    n, k = num_workers, owners_per_unit
    if capacity is None or k == n:
        return (k / n,) * n
    full: set[int] = set()
    while True:
        rest = sum(capacity[w] for w in range(n) if w not in full)
        scale = (k - len(full)) / rest
        over = {w for w in range(n) if w not in full and capacity[w] * scale >= 1.0}
        if not over:
            return tuple(1.0 if w in full else capacity[w] * scale for w in range(n))
        full |= over
        if len(full) == k:
            slow = sorted(set(range(n)) - full)
            if slow:
                raise PlanError(
                    f"worker_capacity: {list(capacity)} leaves nothing for workers {slow}: the {k} faster ones would "
                    f"own every unit with owners_per_unit={k}; take a larger owners_per_unit, or capacities closer "
                    "together"
                )


def arrange(shares: Sequence[float], order: Sequence[int]) -> Arrangement:
    """Lays the arcs of the workers around the circle in the given order."""
    arcs, at = [], 0.0
    for w in order:
        arcs.append((w, at, at + shares[w]))
        at += shares[w]
    marks = sorted({0.0} | {end % 1.0 for _, _, end in arcs})
    starts = [m for i, m in enumerate(marks) if m < 1.0 - _SHORTEST and (i == 0 or m - marks[i - 1] > _SHORTEST)]
    borders = [*starts[1:], 1.0]
    workers, first, end = np.array([w for w, _, _ in arcs]), *np.array([arc[1:] for arc in arcs]).T
    turn = np.floor(first)
    owners = []
    for start, stop in zip(starts, borders, strict=True):
        middle = (start + stop) / 2
        covers = ((first <= middle + turn) & (middle + turn < end)) | (
            (first <= middle + turn + 1) & (middle + turn + 1 < end)
        )
        owners.append(tuple(sorted(workers[covers].tolist())))
    return Arrangement(tuple(borders), tuple(owners))


def arrangements(shares: Sequence[float], max_owner_sets: int, most: int, seed: int) -> list[Arrangement]:
    """Orders of the workers that together mix well, with at most `max_owner_sets` different owner sets.

    Raises:
        PlanError: if not even one fits.
    """
    n = len(shares)
    rng = Random(seed)
    found: list[Arrangement] = []
    used: set[OwnerSet] = set()
    for _ in range(most):
        best: tuple[float, Arrangement] | None = None
        for _ in range(_DRAWS):
            drawn = arrange(shares, sorted(range(n), key=lambda _: rng.random()))
            if len(used | set(drawn.owners)) > max_owner_sets:
                continue
            gap = round(spectral_gap(_masses([*found, drawn]), n), _DIGITS)
            if best is None or gap > best[0]:
                best = gap, drawn
        if best is None:
            break
        found.append(best[1])
        used |= set(best[1].owners)
    if not found:
        raise PlanError(f"max_owner_sets: got {max_owner_sets}, takes {n} or more with these worker_capacity")
    return found


def units_in_turn(arrangement: Arrangement, sizes: Sequence[int]) -> list[list[OwnerSet]]:
    """For spaces of few units, `sizes[i]` owner sets each: every worker gets its share in each space and over all.

    The units of a space stand at equal distances on the circle. The next space starts elsewhere, so that over spaces of
    equal size all units together stand at equal distances: within one unit of the share, in a space and over all.
    """
    count = len(sizes)
    stride = next(s for s in range(max(1, round(0.618 * count)), count + 1) if gcd(s, count) == 1) if count > 1 else 1
    spaces = []
    for i, size in enumerate(sizes):
        offset = (i * stride % count + 0.5) / count
        spaces.append([arrangement.at((unit + offset) / size) for unit in range(size)])
    return spaces


def arrangements_for(units: int, available: int) -> int:
    """How many arrangements spaces with so many units in all should use."""
    return max(1, min(available, units // _UNITS_PER_ARRANGEMENT))


def _masses(all_arrangements: Sequence[Arrangement]) -> list[tuple[OwnerSet, float]]:
    masses = []
    for arrangement in all_arrangements:
        start = 0.0
        for border, owners in zip(arrangement.borders, arrangement.owners, strict=True):
            masses.append((owners, border - start))
            start = border
    return masses
