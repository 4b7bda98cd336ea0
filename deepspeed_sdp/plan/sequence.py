"""Owner sets unit by unit, for spaces with fewer units than a class has sets: whole blocks, a few KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from random import Random

import numpy as np

from deepspeed_sdp.plan.classes import OwnerSet, window_class

# Where a repeated part begins again, a worker may be left out too often: then another part is drawn.
_SEAM_TRIES = 10


def windows_in_turn(num_workers: int, set_size: int, sizes: Sequence[int]) -> list[list[OwnerSet]]:
    """For every space `sizes[i]` windows, end to end around the ring of workers and on over the spaces.

    Any run of them covers all workers equally often, within one: `N / gcd(N, K)` owner sets are enough for any model.
    """
    ring = window_class(range(num_workers), set_size, gcd(num_workers, set_size))
    step = set_size // gcd(num_workers, set_size)
    at = 0
    spaces = []
    for size in sizes:
        spaces.append([ring[(at + i) * step % len(ring)] for i in range(size)])
        at += size
    return spaces


def mixed_sequence(num_workers: int, set_size: int, sizes: Sequence[int], seed: int) -> list[list[OwnerSet]]:
    """For every space `sizes[i]` owner sets, every pair of workers together about equally often.

    In every space all workers are in equally many sets, within one, and so they are over all spaces. With spaces of one
    unit and `2K ≥ N` no worker is left out three times in a row: who was left out twice has had the least so far.
    """
    n, k = num_workers, set_size
    rng = Random(seed)
    together = np.zeros((n, n), dtype=np.int64)
    turns = [0] * n
    waited = [0] * n
    spaces = []
    for size in sizes:
        base, extra = divmod(size * k, n)
        # With 3K ≤ N, who has waited can only be served by the same teams over and over: there mixing comes first.
        urgent = [waited[w] >= 2 and 3 * k > n for w in range(n)]
        quota = [base] * n
        for w in _pick(extra, turns, urgent, together, rng):
            quota[w] += 1
        turns = [turn + share for turn, share in zip(turns, quota, strict=True)]
        sets = []
        for left in range(size, 0, -1):
            needed = [left - q for q in quota]
            owners = _pick(k, needed, [q == left for q in quota], together, rng) if left > 1 else None
            chosen = tuple(sorted(owners)) if owners is not None else tuple(w for w in range(n) if quota[w])
            for w in chosen:
                quota[w] -= 1
            together[np.ix_(chosen, chosen)] += 1
            sets.append(chosen)
        served = {w for owners in sets for w in owners}
        waited = [0 if w in served else waited[w] + 1 for w in range(n)]
        spaces.append(sets)
    return spaces


def _pick(
    count: int,
    rank: Sequence[int],
    urgent: Sequence[bool],
    together: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    rng: Random,
) -> list[int]:
    """`count` workers of the least rank, the urgent ones first, then those that have met the chosen ones least."""
    chosen: list[int] = []
    left = np.arange(len(rank))
    ranks, waits = np.asarray(rank), ~np.asarray(urgent, dtype=bool)
    met = np.zeros(len(rank), dtype=np.int64)
    for _ in range(count):
        draws = np.array([rng.random() for _ in range(len(left))])
        pick = np.lexsort((draws, met[left], waits[left], ranks[left]))[0]
        worker = int(left[pick])
        left = np.delete(left, pick)
        chosen.append(worker)
        met += together[worker]
    return chosen


def repeated_sequence(
    num_workers: int, set_size: int, sizes: Sequence[int], max_owner_sets: int, seed: int
) -> list[list[OwnerSet]]:
    """A mixed sequence with at most `max_owner_sets` different sets: repeated where it is longer, else windows in turn.

    A part can be repeated where all workers are in equally many of its sets.
    """
    n, k = num_workers, set_size
    if sum(sizes) <= max_owner_sets:
        return mixed_sequence(n, k, sizes, seed)
    if len(set(sizes)) == 1:
        lap = n // gcd(n, sizes[0] * k)
        spaces = max_owner_sets // (lap * sizes[0]) * lap
        for attempt in range(_SEAM_TRIES if spaces else 0):
            part = mixed_sequence(n, k, sizes[:spaces], seed + attempt)
            repeated = [part[i % spaces] for i in range(len(sizes))]
            if 2 * k < n or longest_absence(repeated, n) <= max(2, longest_absence(part, n)):
                return repeated
    return windows_in_turn(n, k, sizes)


def longest_absence(spaces: Sequence[Sequence[OwnerSet]], num_workers: int) -> int:
    """In how many spaces in a row a worker owns nothing, at most."""
    longest, absent = 0, [0] * num_workers
    for sets in spaces:
        present = {worker for owners in sets for worker in owners}
        absent = [0 if worker in present else run + 1 for worker, run in enumerate(absent)]
        longest = max(longest, *absent)
    return longest
