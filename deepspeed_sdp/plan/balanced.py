"""The search for orders of the workers whose windows let every pair of workers meet about equally often."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from random import Random

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.classes import ParallelClass, window_class
from deepspeed_sdp.plan.mixing import second_eigenvalues, spectral_gap_bound

Matrix = NDArray[np.float64]
# Random starts of the descent for each class, in one attempt after the other until one reaches the bound. Few starts
# choose less greedily: of six workers in pairs, the three classes that mix best leave no two others.
_STARTS = (8, 1, 2, 4, 32)
# Gaps are compared rounded, so that another LAPACK does not choose another plan.
_DIGITS = 7


def balanced_orders(num_workers: int, owners: int, most: int, seed: int) -> list[list[int]]:
    """Up to `most` orders of the workers such that the windows of all of them together mix as well as could be found.

    Greedy: every next order is the one, of several found by descent, with which the spectral gap is largest.

    Args:
        num_workers: `N`.
        owners: `K`, below `N`.
        most: bound on the orders, at least 1.
        seed: of the random starts.
    """
    meetings, rng = _meetings(num_workers, owners), Random(seed)
    bound = round(spectral_gap_bound(num_workers, owners), _DIGITS)
    found: list[tuple[list[list[int]], list[float]]] = []
    for starts in _STARTS:
        found.append(_greedy(meetings, most, starts, bound, rng))
        if max(found[-1][1]) >= bound:
            break
    orders, gaps = max(found, key=lambda attempt: max(attempt[1]))
    return orders[: gaps.index(max(gaps)) + 1]


def _greedy(meetings: Matrix, most: int, starts: int, bound: float, rng: Random) -> tuple[list[list[int]], list[float]]:
    """Orders, and the gap of each prefix of them."""
    num_workers = len(meetings)
    total = meetings.copy()
    orders, gaps = [list(range(num_workers))], _gaps(total[None])
    while len(orders) < most and gaps[-1] < bound:
        drawn = [sorted(range(num_workers), key=lambda _: rng.random()) for _ in range(starts)]
        candidates = [_descend(total, meetings, order) for order in drawn]
        totals = np.stack([total + _placed(meetings, order) for order in candidates])
        reached = _gaps(totals)
        best = reached.index(max(reached))
        orders.append(candidates[best])
        gaps.append(reached[best])
        total = totals[best]
    return orders, gaps


def _meetings(num_workers: int, owners: int) -> Matrix:
    """`[N, N]`: in how many windows of a ring the workers at two places both are."""
    member = np.zeros((num_workers // gcd(num_workers, owners), num_workers))
    for window, places in enumerate(window_class(range(num_workers), owners, gcd(num_workers, owners))):
        member[window, list(places)] = 1.0
    return member.T @ member


def _placed(meetings: Matrix, order: Sequence[int]) -> Matrix:
    """The same by worker, where worker `order[i]` is at place `i`."""
    place = np.argsort(order)
    return meetings[np.ix_(place, place)]


def _gaps(totals: Matrix) -> list[float]:
    """Of `[B, N, N]` pair counts; all workers are in equally many windows, so `W` is the counts over their row sum."""
    return [round(1.0 - second, _DIGITS) for second in second_eigenvalues(totals / totals[0, 0].sum())]


def _descend(total: Matrix, meetings: Matrix, order: list[int]) -> list[int]:
    """From `order` the best swap of two workers while one helps, so that few pairs counted in `total` meet again."""
    placed = np.array(order)
    counts = total[np.ix_(placed, placed)]
    again = meetings @ counts
    apart = 2.0 * (meetings[0, 0] - meetings)
    while True:
        own = np.diag(again)
        change = again + again.T - own[:, None] - own - apart * (counts - counts[0, 0])
        a, b = divmod(int(change.argmin()), len(placed))
        if change[a, b] > -0.5:
            return placed.tolist()  # type: ignore[no-any-return]
        again += np.outer(meetings[:, b] - meetings[:, a], counts[a] - counts[b])
        again[:, [a, b]] = again[:, [b, a]]
        counts[[a, b]] = counts[[b, a]]
        counts[:, [a, b]] = counts[:, [b, a]]
        placed[[a, b]] = placed[[b, a]]


def balanced_classes(num_workers: int, owners: int, most: int, seed: int) -> list[ParallelClass]:
    """The windows of the balanced orders."""
    return [window_class(o, owners, gcd(num_workers, owners)) for o in balanced_orders(num_workers, owners, most, seed)]
