"""Which partitions into teams a plan uses, and in which order: known families where there are, else a seeded search."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.classes import ParallelClass, pair_counts, team_class
from deepspeed_sdp.plan.developed import enough_gap
from deepspeed_sdp.plan.geometry import crossing_pairs, known_classes
from deepspeed_sdp.plan.mixing import spectral_gap_bound

Counts = NDArray[np.int64]

# Candidates whose eigenvalues are computed at each step, out of those that repeat the fewest pairs.
_SHORTLIST = 16
# Random starting points of the swap search at each step.
_RESTARTS = 8
# Gaps are compared rounded, so that another LAPACK does not choose another plan.
_DIGITS = 7


def resolvable_classes(num_workers: int, team_size: int, max_owner_sets: int, seed: int) -> list[ParallelClass]:
    """Partitions of the workers into teams, such that every prefix of the list mixes as well as could be found.

    Args:
        num_workers: `N`.
        team_size: `K`, a proper divisor of `N`.
        max_owner_sets: at most this many teams over all classes; at least `2N/K` (`N` for `K = 1`).
        seed: of the search; families known in closed form do not need it.
    """
    known = known_classes(num_workers, team_size)
    if team_size == 1:
        return known
    limit = max_owner_sets * team_size // num_workers
    if team_size == 2 and num_workers // 2 <= limit < len(known):
        known = crossing_pairs(num_workers)
    blocks = team_class(range(num_workers), team_size)
    shifted = team_class([*range(1, num_workers), 0], team_size)
    if known and len(known) <= limit:
        chosen, gaps = _choose(known, num_workers, limit, None)
    else:
        pool = [*known, blocks, shifted]
        chosen, gaps = _choose(list(dict.fromkeys(pool)), num_workers, limit, Random(seed))
    best = max(gaps)
    if best <= 0.0:
        return [blocks, shifted]
    enough = enough_gap(best, spectral_gap_bound(num_workers, team_size))
    return chosen[: next(i for i, gap in enumerate(gaps) if gap >= enough) + 1]


def _choose(
    pool: list[ParallelClass], num_workers: int, limit: int, rng: Random | None
) -> tuple[list[ParallelClass], list[float]]:
    """Greedily the class after which the gap is largest; with `rng` also classes outside the pool are searched.

    Returns the classes and the gap of each prefix.
    """
    team_size = len(pool[0][0])
    bound = round(spectral_gap_bound(num_workers, team_size), _DIGITS)
    remaining = [(parallel_class, pair_counts(parallel_class, num_workers)) for parallel_class in pool]
    total: Counts = np.zeros((num_workers, num_workers), dtype=np.int64)
    chosen: list[ParallelClass] = []
    gaps: list[float] = []
    while len(chosen) < limit and (not gaps or gaps[-1] < bound):
        remaining.sort(key=lambda entry: int((entry[1] * total).sum()))
        candidates = remaining[:_SHORTLIST]
        if rng is not None and chosen:
            searched = {_swap_search(total, team_size, rng) for _ in range(_RESTARTS)}
            candidates = candidates + [(found, pair_counts(found, num_workers)) for found in sorted(searched)]
        if not candidates:
            break
        # All partitions into teams of K have the same degrees: W is the pair counts over K times the classes.
        mixing = np.stack([total + counts for _, counts in candidates]) / (team_size * (len(chosen) + 1))
        candidate_gaps = np.round(1.0 - np.linalg.eigvalsh(mixing)[:, -2], _DIGITS)
        pick = int(np.argmax(candidate_gaps))
        chosen.append(candidates[pick][0])
        gaps.append(float(candidate_gaps[pick]))
        total = total + candidates[pick][1]
        remaining = [entry for entry in remaining if entry[0] != chosen[-1]]
    return chosen, gaps


def _swap_search(total: Counts, team_size: int, rng: Random) -> ParallelClass:
    """A partition that repeats few of the pairs counted in `total`: from a random one, the best swap while it helps."""
    n = len(total)
    # Sorting by random() and not shuffle(): Python promises only the former's sequence over its versions.
    order = sorted(range(n), key=lambda _: rng.random())
    team = np.empty(n, dtype=np.int64)
    team[order] = np.arange(n) // team_size
    diagonal = np.diag(total)
    while True:
        to_team: Counts = total @ np.eye(n // team_size, dtype=np.int64)[team]
        own = to_team[np.arange(n), team] - diagonal
        cross = to_team[:, team]
        change = cross + cross.T - own[:, None] - own[None, :] - 2 * total
        change[team[:, None] == team[None, :]] = 0
        a, b = divmod(int(np.argmin(change)), n)
        if change[a, b] >= 0:
            return team_class(np.argsort(team, kind="stable").tolist(), team_size)
        team[a], team[b] = team[b], team[a]
