"""The search for orders of the workers whose windows let every pair of workers meet about equally often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.designs.windows import Windows, joint_gap, windows
from deepspeed_sdp.plan.gap import second_eigenvalues, spectral_gap_bound

Matrix = NDArray[np.float64]
# Random starts of the descent for each class, and the power of W it looks at, in one attempt after the other until one
# reaches the bound. Not all are greedy: of six workers in pairs, the three classes that mix best leave no two others.
# The third power is the gradient of Σλ⁴: it shows which pairs to keep apart even while no pair has to meet again.
_ATTEMPTS = ((8, 3), (8, 1), (1, 1), (1, 1), (2, 1), (1, 1), (4, 3))
# More workers than this get random orders: these come nearer to what can be reached the more workers there are, and a
# descent takes longer with the cube of their number.
_LARGEST_SEARCHED = 64
# Classes are left out where this share of the best gap, or of the bound, is had without them: each costs groups.
_ENOUGH, _NEARLY_OPTIMAL = 0.99, 0.98
# Gaps and costs are compared rounded, so that another LAPACK does not choose another plan.
_DIGITS = 7


def balanced_windows(num_workers: int, owners: int, most: int, seed: int) -> tuple[Windows, ...]:
    """Up to `most` classes of windows that together mix as well as could be found, and every few of them well.

    Greedy: every next order of the workers is the one, of several found by descent, with which the spectral gap is
    largest.

    Args:
        num_workers: `N`.
        owners: `K`, below `N`.
        most: bound on the classes, at least 1.
        seed: of the random starts.
    """
    bound = round(spectral_gap_bound(num_workers, owners), _DIGITS)
    found: list[tuple[list[Windows], list[float]]] = []
    for attempt in _attempts(num_workers, owners, most, bound, Random(seed)):
        found.append(attempt)
        if attempt[1][-1] >= bound:
            break
    classes, gaps = max(found, key=lambda attempt: max(attempt[1]))
    best = max(gaps)
    enough = best if best >= bound else max(_ENOUGH * best, min(best, _NEARLY_OPTIMAL * bound))
    return tuple(classes[: next(i for i, gap in enumerate(gaps) if gap >= enough) + 1])


def _attempts(n: int, k: int, most: int, bound: float, rng: Random) -> Iterator[tuple[list[Windows], list[float]]]:
    """Classes, and the gap of each prefix of them."""
    if k == 2 and n % 2 == 0 and n // 2 <= most < n - 1:
        yield _crossing_pairs(n)
    if n > _LARGEST_SEARCHED:
        classes = [windows(_random_order(n, rng), k) for _ in range(most)]
        yield classes, [round(joint_gap(classes[: i + 1]), _DIGITS) for i in range(most)]
        return
    for starts, power in _ATTEMPTS:
        yield _greedy(n, k, most, bound, starts, power, rng)


def _random_order(n: int, rng: Random) -> list[int]:
    # Sorting by random() and not shuffle(): Python promises only the former's sequence over its versions.
    return sorted(range(n), key=lambda _: rng.random())


def _crossing_pairs(n: int) -> tuple[list[Windows], list[float]]:
    """All pairs of one half of the workers with the other.

    The gap is 1/2, for any `n`. Where not all pairs fit, none is larger: of two workers `i, j` that share nothing, the
    vector `e_i - e_j` shows that `λ₂(W) ≥ 1/2`.
    """
    half = n // 2
    orders = [[w for i in range(half) for w in (i, half + (i + by) % half)] for by in range(half)]
    return [windows(order, 2) for order in orders], [0.0] * (half - 1) + [0.5]


def _greedy(
    n: int, k: int, most: int, bound: float, starts: int, power: int, rng: Random
) -> tuple[list[Windows], list[float]]:
    classes = [windows(range(n), k)]
    meetings = _meetings(classes[0])
    total = meetings.copy()
    gaps = _gaps(total[None])
    while len(classes) < most and gaps[-1] < bound:
        orders = [_random_order(n, rng) for _ in range(starts)]
        # In whole numbers every swap is exact: none is undone, and every machine takes the same.
        avoided = np.rint(np.linalg.matrix_power(total / total[0].sum(), power) * 10**_DIGITS)
        orders = [_descend(np.minimum(avoided, avoided.T), meetings, order) for order in orders]
        totals = np.stack([total + _placed(meetings, order) for order in orders])
        reached = _gaps(totals)
        best = reached.index(max(reached))
        classes.append(windows(orders[best], k))
        gaps.append(reached[best])
        total = totals[best]
    return classes, gaps


def _meetings(ring: Windows) -> Matrix:
    """`[N, N]`: in how many windows two workers both are."""
    member = np.zeros((len(ring.owner_sets), len(ring.order)))
    np.put_along_axis(member, ring.members, 1.0, axis=1)
    return member.T @ member


def _placed(meetings: Matrix, order: Sequence[int]) -> Matrix:
    """The same with worker `order[i]` where worker `i` was."""
    place = np.argsort(order)
    return meetings[np.ix_(place, place)]


def _gaps(totals: Matrix) -> list[float]:
    """Of `[B, N, N]` pair counts; all workers are in equally many windows, so `W` is the counts over their row sum."""
    return [round(1.0 - second, _DIGITS) for second in second_eigenvalues(totals / totals[0, 0].sum())]


def _descend(avoided: Matrix, meetings: Matrix, order: list[int]) -> list[int]:
    """From `order` the best swap of two workers while one helps, so that pairs with a large entry in `avoided` part."""
    placed = np.array(order)
    cost = avoided[np.ix_(placed, placed)]
    met = meetings @ cost
    apart = meetings[0, 0] - meetings
    while True:
        own, alone = np.diag(met), np.diag(cost)
        change = met + met.T - own[:, None] - own - apart * (2.0 * cost - alone[:, None] - alone)
        a, b = divmod(int(change.argmin()), len(placed))
        if change[a, b] >= 0.0:
            return placed.tolist()  # type: ignore[no-any-return]
        met += np.outer(meetings[:, b] - meetings[:, a], cost[a] - cost[b])
        met[:, [a, b]] = met[:, [b, a]]
        cost[[a, b]] = cost[[b, a]]
        cost[:, [a, b]] = cost[:, [b, a]]
        placed[[a, b]] = placed[[b, a]]
