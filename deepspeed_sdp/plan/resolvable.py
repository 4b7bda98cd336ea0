"""Which partitions into teams a plan uses, and in which order: known families where there are, else a seeded search."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.classes import ParallelClass, team_class
from deepspeed_sdp.plan.developed import enough_gap
from deepspeed_sdp.plan.geometry import crossing_pairs, digit_classes, known_classes
from deepspeed_sdp.plan.mixing import second_eigenvalues, spectral_gap_bound

Counts = NDArray[np.int64]
# Above so many workers a search takes seconds to minutes, and classes of digits are nearly as good or better.
_LARGEST_SEARCHED = 64
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
    limit = max_owner_sets * team_size // num_workers
    if num_workers > _LARGEST_SEARCHED and team_size > 1:
        chosen, gaps = _choose(digit_classes(num_workers, team_size, seed), num_workers, limit, None)
        return chosen[: _enough(gaps, num_workers, team_size)]
    known = known_classes(num_workers, team_size)
    if team_size == 1:
        return known
    if team_size == 2 and num_workers // 2 <= limit < len(known):
        known = crossing_pairs(num_workers)
    blocks = team_class(range(num_workers), team_size)
    shifted = team_class([*range(1, num_workers), 0], team_size)
    if known and len(known) <= limit:
        chosen, gaps = _choose(known, num_workers, limit, None)
    else:
        pool = [*known, blocks, shifted]
        chosen, gaps = _choose(list(dict.fromkeys(pool)), num_workers, limit, Random(seed))
    if max(gaps) <= 0.0:
        return [blocks, shifted]
    return chosen[: _enough(gaps, num_workers, team_size)]


def _enough(gaps: list[float], num_workers: int, team_size: int) -> int:
    """How many classes are taken, by the gap of each prefix."""
    enough = enough_gap(max(gaps), spectral_gap_bound(num_workers, team_size))
    return next(i for i, gap in enumerate(gaps) if gap >= enough) + 1


def _choose(
    pool: list[ParallelClass], num_workers: int, limit: int, rng: Random | None
) -> tuple[list[ParallelClass], list[float]]:
    """Greedily the class after which the gap is largest; with `rng` also classes outside the pool are searched.

    Returns the classes and the gap of each prefix.
    """
    team_size = len(pool[0][0])
    remaining = [_Candidate(parallel_class, num_workers) for parallel_class in pool]
    chosen: list[_Candidate] = []
    gaps: list[float] = []
    while len(chosen) < limit and (not gaps or gaps[-1] < _best_gap(num_workers, team_size)):
        remaining.sort(key=lambda candidate: candidate.repeated)
        candidates = remaining[:_SHORTLIST]
        candidate_gaps = _gaps(chosen, candidates)
        if rng is not None and chosen:
            orders = [_random_order(num_workers, rng) for _ in range(_RESTARTS)]
            # What mixes best for its number of classes cannot be bettered.
            if max(candidate_gaps, default=0.0) < _best_gap(num_workers, team_size, len(chosen) + 1):
                total = _pairs(chosen)
                searched = {_swap_search(total, team_size, order) for order in orders}
                found = [_Candidate(parallel_class, num_workers, chosen) for parallel_class in sorted(searched)]
                candidates = candidates + found
                candidate_gaps += _gaps(chosen, found)
        if not candidates:
            break
        pick = candidates[int(np.argmax(candidate_gaps))]
        gaps.append(max(candidate_gaps))
        chosen.append(pick)
        remaining = [candidate for candidate in remaining if candidate.teams != pick.teams]
        for candidate in remaining:
            candidate.meet(pick)
    return [candidate.teams for candidate in chosen], gaps


class _Candidate:
    """A partition, and how its teams overlap with those of the chosen partitions.

    Attributes:
        labels: `[N]`, the team of every worker.
        overlaps: for each chosen one `[N/K, N/K]`, the workers that a team here and a team there have in common.
        repeated: pairs of workers, both ways, that are in one team here and in a chosen one.
    """

    def __init__(self, teams: ParallelClass, num_workers: int, chosen: Sequence[_Candidate] = ()) -> None:
        self.teams = teams
        self.labels = np.empty(num_workers, dtype=np.int64)
        for team, workers in enumerate(teams):
            self.labels[list(workers)] = team
        self.overlaps: list[Counts] = []
        self.repeated = 0
        for other in chosen:
            self.meet(other)

    def meet(self, other: _Candidate) -> None:
        count = len(self.teams)
        common = np.bincount(self.labels * count + other.labels, minlength=count * count).reshape(count, count)
        self.overlaps.append(common)
        self.repeated += int((common**2).sum())


def _best_gap(num_workers: int, team_size: int, num_classes: int | None = None) -> float:
    """What so many partitions (any number: None) cannot mix better than.

    `W` has the trace `N/K`, and a class adds `N/K - 1` to its rank.
    """
    teams = num_workers // team_size
    bound = spectral_gap_bound(num_workers, team_size)
    if num_classes is not None and num_classes * (teams - 1) < num_workers - 1:
        bound = 1.0 - 1.0 / num_classes
    return round(bound, _DIGITS)


def _gaps(chosen: list[_Candidate], candidates: list[_Candidate]) -> list[float]:
    """With each candidate. All partitions into teams of K have the same degrees: W is the pair counts over them."""
    if not candidates:
        return []
    num_workers, teams = len(candidates[0].labels), len(candidates[0].teams)
    size = (len(chosen) + 1) * teams
    if size < num_workers:
        # The teams' overlaps have the same eigenvalues as the workers' pair counts, but for zeros.
        matrices = np.zeros((len(candidates), size, size))
        for i, candidate in enumerate([*chosen, *candidates]):
            row = min(i, len(chosen)) * teams
            across = np.hstack([*candidate.overlaps[:i], np.eye(teams, dtype=np.int64) * (num_workers // teams)])
            to = matrices if i < len(chosen) else matrices[i - len(chosen)]
            to[..., row : row + teams, : row + teams] = across
    else:
        total = _pairs(chosen)
        matrices = np.stack([total + _pairs([candidate]) for candidate in candidates]).astype(np.float64)
    # Of a symmetric matrix only the lower half is read.
    mixing = matrices * (teams / num_workers / (len(chosen) + 1))
    return [round(1.0 - second, _DIGITS) for second in second_eigenvalues(mixing)]


def _pairs(classes: list[_Candidate]) -> Counts:
    """`[N, N]`: how many of the classes have both workers in one team; on the diagonal, all."""
    labels = np.stack([candidate.labels for candidate in classes])
    return np.sum(labels[:, :, None] == labels[:, None, :], axis=0, dtype=np.int64)  # type: ignore[no-any-return]


def _random_order(num_workers: int, rng: Random) -> list[int]:
    # Sorting by random() and not shuffle(): Python promises only the former's sequence over its versions.
    return sorted(range(num_workers), key=lambda _: rng.random())


def _swap_search(total: Counts, team_size: int, order: list[int]) -> ParallelClass:
    """A partition that repeats few of the pairs counted in `total`: from a random one, the best swap while it helps."""
    n = len(total)
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
