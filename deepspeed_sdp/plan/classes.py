"""Parallel classes: the owner sets of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

OwnerSet = tuple[int, ...]
"""The workers that own a unit, ascending."""

ParallelClass = tuple[OwnerSet, ...]
"""The owner sets of one layer: chunk `t` of a unit space goes to set `t`.

All sets have `K` workers and every worker is in the same number `r` of them. The order is circular: sets
`i, i+r, i+2r, …` lie end to end around a ring of the workers, so a run of them covers all workers equally often,
within one. A partition into teams is the case `r = 1`.
"""


def sets_per_worker(parallel_class: ParallelClass, num_workers: int) -> int:
    """In how many sets of the class each worker is (`r`)."""
    return len(parallel_class) * len(parallel_class[0]) // num_workers


def rings(num_sets: int, step: int) -> list[list[int]]:
    """Indices of a class cut into rings `i, i+step, i+2·step, …` (modulo `num_sets`), `step` the sets per worker."""
    count = gcd(num_sets, step)
    return [[(first + step * i) % num_sets for i in range(num_sets // count)] for first in range(count)]


def team_class(order: Sequence[int], team_size: int) -> ParallelClass:
    """The partition of the workers into runs of `team_size` of `order`, teams sorted by their first worker."""
    return tuple(sorted(tuple(sorted(order[i : i + team_size])) for i in range(0, len(order), team_size)))


def window_class(order: Sequence[int], size: int, stride: int, first: int = 0) -> ParallelClass:
    """Windows of `size` consecutive workers of the ring `order`, starting at `first` and every `stride` after it."""
    n = len(order)
    return tuple(tuple(sorted(order[(c + i) % n] for i in range(size))) for c in range(first, first + n, stride))


def complement_class(parallel_class: ParallelClass, num_workers: int) -> ParallelClass:
    """The workers outside each set. Pairs then meet as evenly as before, since each meets `m - 2r` times more."""
    everyone = frozenset(range(num_workers))
    return tuple(tuple(sorted(everyone.difference(owners))) for owners in parallel_class)


def covers_evenly(parallel_class: ParallelClass, num_workers: int) -> bool:
    """Whether any part of the class covers all workers equally often, within one.

    So it is for teams, in which everyone is once, and for their complements, in which everyone is missing once.
    """
    return sets_per_worker(parallel_class, num_workers) in (1, len(parallel_class) - 1)
