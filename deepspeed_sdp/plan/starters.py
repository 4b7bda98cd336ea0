"""Resolvable designs given by a few starter classes and a rotation of the workers (1-rotational designs).

The starters were found by a search over rotations; that all pairs come out equally often is tested.
"""

from __future__ import annotations

from deepspeed_sdp.plan.classes import OwnerSet, ParallelClass

# (N, K) -> length M of the rotation, starter classes. Workers 0 … M-1, M … 2M-1, … turn in cycles, a rest stands still.
_STARTERS: dict[tuple[int, int], tuple[int, tuple[ParallelClass, ...]]] = {
    (10, 5): (
        9,
        (
            ((0, 1, 2, 4, 5), (3, 6, 7, 8, 9)),
            ((0, 1, 3, 7, 9), (2, 4, 5, 6, 8)),
        ),
    ),
    (12, 3): (11, (((0, 4, 9), (1, 2, 11), (3, 6, 7), (5, 8, 10)),)),
    (12, 4): (11, (((0, 4, 5, 7), (1, 3, 6, 11), (2, 8, 9, 10)),)),
    (14, 7): (
        13,
        (
            ((0, 1, 3, 6, 8, 12, 13), (2, 4, 5, 7, 9, 10, 11)),
            ((0, 2, 3, 4, 9, 12, 13), (1, 5, 6, 7, 8, 10, 11)),
        ),
    ),
    # Kirkman's fifteen schoolgirls.
    (15, 3): (7, (((0, 3, 8), (1, 7, 14), (2, 4, 11), (5, 6, 9), (10, 12, 13)),)),
    # Pairs meet nearly equally often: 0.98 of the bound.
    (15, 5): (
        7,
        (
            ((0, 2, 3, 6, 7), (1, 9, 11, 13, 14), (4, 5, 8, 10, 12)),
            ((0, 2, 3, 11, 14), (1, 4, 6, 10, 13), (5, 7, 8, 9, 12)),
            ((0, 2, 3, 12, 13), (1, 6, 7, 8, 9), (4, 5, 10, 11, 14)),
        ),
    ),
}


def rotated_starters(num_workers: int, team_size: int) -> list[ParallelClass]:
    """The starter classes of `(N, K)` in all their rotations, or an empty list."""
    if (num_workers, team_size) not in _STARTERS:
        return []
    length, starters = _STARTERS[num_workers, team_size]
    return [
        tuple(sorted(rotate(owners, length, by, num_workers) for owners in starter))
        for by in range(length)
        for starter in starters
    ]


def rotate(owners: OwnerSet, length: int, by: int, num_workers: int) -> OwnerSet:
    """The workers `by` places on in their cycles of `length`; those behind the last whole cycle stand still."""
    turning = num_workers // length * length
    return tuple(sorted(w // length * length + (w + by) % length if w < turning else w for w in owners))
