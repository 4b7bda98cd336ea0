"""Designs whose classes have unequally many turns, for `(N, K)` where none of equal turns was found that mixes well.

A class that has two turns gives its owner sets twice the units of one that has one, and costs no process groups more.
So few sets can hold all pairs equally often where that takes too many of equal weight: 80 triples of 16 workers hold
each of the 120 pairs twice, and these can be 32 triples with two turns and 16 with one, 48 owner sets.

The base blocks and turns were found by a search over rotations; the gaps they reach are tested.
"""

from __future__ import annotations

from deepspeed_sdp.plan.classes import ParallelClass
from deepspeed_sdp.plan.starters import rotate

Block = tuple[int, ...]

# (N, K) -> length M of the rotation; per class the base blocks that are rotated; the classes in their turns.
# Workers 0 … M-1, M … 2M-1, … turn in cycles. In this order of the turns models of 2 to 40 layers,
# attention and MLP in turn, mix best on average.
_DESIGNS: dict[tuple[int, int], tuple[int, tuple[tuple[Block, ...], ...], tuple[int, ...]]] = {
    # Two base blocks where three, of equal turns, are more than 16 owner sets.
    (8, 3): (8, (((0, 1, 3),), ((0, 1, 4),)), (0, 1, 0)),
    # Not all pairs fit. What can be reached here is low, but less so than with the pairs that the search takes.
    (13, 2): (13, (((0, 1),), ((0, 3),), ((0, 2),), ((0, 6),)), (0, 2, 0, 3, 1, 2, 3, 1, 2, 3)),
    (15, 2): (15, (((0, 1),), ((0, 2),), ((0, 4),), ((0, 7),)), (0, 3, 2, 1)),
    (14, 3): (
        7,
        (
            ((0, 1, 5), (7, 9, 11)),
            ((0, 1, 8), (0, 9, 13)),
            ((0, 1, 8), (0, 11, 12)),
            ((0, 2, 9), (0, 8, 10)),
            ((0, 2, 9), (0, 11, 12)),
            ((0, 2, 10), (0, 11, 12)),
            ((0, 3, 13), (0, 9, 13)),
            ((0, 3, 13), (0, 11, 12)),
        ),
        (5, 1, 3, 7, 2, 0, 6, 4, 1, 0, 7),
    ),
    (14, 4): (14, (((0, 1, 3, 5),), ((0, 1, 4, 10),), ((0, 1, 3, 8),)), (2, 1, 0, 2, 1, 2)),
    (14, 5): (14, (((0, 1, 2, 4, 7),), ((0, 1, 3, 9, 11),), ((0, 1, 2, 5, 9),)), (2, 1, 2, 0, 1, 2)),
    # In the next two all pairs meet equally often. Five turns here are the lines of AG(2,4) that miss one point: all
    # pairs but the five places apart, which the two others hold.
    (15, 4): (15, (((0, 1, 5, 10),), ((0, 2, 5, 10),), ((0, 1, 3, 7),)), (2, 2, 0, 2, 1, 2, 2)),
    (16, 3): (16, (((0, 4, 8),), ((0, 1, 7),), ((0, 2, 5),)), (1, 2, 2, 1, 0)),
}


def weighted_classes(num_workers: int, set_size: int, max_owner_sets: int) -> list[ParallelClass]:
    """The classes of `(N, K)` in their turns, or an empty list where there are none or their sets are too many."""
    if (num_workers, set_size) not in _DESIGNS:
        return []
    length, developed, turns = _DESIGNS[num_workers, set_size]
    classes = [
        tuple(rotate(block, length, by, num_workers) for block in blocks for by in range(length))
        for blocks in developed
    ]
    if len({owners for parallel_class in classes for owners in parallel_class}) > max_owner_sets:
        return []
    return [classes[i] for i in turns]
