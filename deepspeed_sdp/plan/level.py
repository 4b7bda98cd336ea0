"""Moving chunk borders until all workers have equally much to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_sdp.plan.cut import Cut

# Relative excess of the slowest worker that is left alone, and the one that is aimed at when borders move.
_TOLERATED, _AIM = 0.005, 0.001
# A chunk changes by at most this share of itself, and what a worker owns of a space stays within this share of the
# space's mean chunk around its due: together with its counterpart, within one chunk.
_LARGEST_CHANGE, _LARGEST_STRAY = 0.25, 0.4
_SWEEPS = 8


def level(cuts: Sequence[Cut], shared: float) -> None:
    """Moves units between the chunks of a space, in multiples of its alignment, so that loads approach what is due.

    MLP neurons are fine enough to make up for what attention heads or whole blocks leave uneven. Every worker still
    owns the same of every space, within one chunk.

    Args:
        cuts: changed in place, where `adjustable`.
        shared: FLOPs per token that every worker has besides.
    """
    num_workers = len(cuts[0].shares)
    targets, over = [0.0] * num_workers, [0.0] * num_workers
    for cut in cuts:
        for w, share in enumerate(cut.shares):
            targets[w] += share * cut.space.num_units * cut.space.unit_cost
        for size, owners in zip(cut.sizes, cut.owners, strict=True):
            for w in owners:
                over[w] += size * cut.space.unit_cost
    over = [owned - target for owned, target in zip(over, targets, strict=True)]

    def excess() -> float:
        return max((o / (t + shared) for o, t in zip(over, targets, strict=True) if t + shared > 0), default=0.0)

    if excess() <= _TOLERATED:
        return
    movable = [cut for cut in cuts if cut.adjustable and len(cut.sizes) > 1]
    rooms = [[_Room(int(_LARGEST_CHANGE * size), int(_LARGEST_CHANGE * size)) for size in cut.sizes] for cut in movable]
    for _ in range(_SWEEPS):
        moved = False
        for cut, room in zip(movable, rooms, strict=True):
            moved = _shift(cut, room, over) or moved
        if excess() <= _AIM or not moved:
            return


@dataclass
class _Room:
    """How many units may still leave a chunk and enter it."""

    less: int
    more: int


def _shift(cut: Cut, room: list[_Room], over: list[float]) -> bool:
    """Moves units once, from the chunk whose owners have the most too much to the one whose have the least."""
    surplus = [sum(over[w] for w in owners) / len(owners) for owners in cut.owners]
    indices = range(len(surplus))
    giver = max((i for i in indices if room[i].less >= cut.multiple), key=lambda i: (surplus[i], -i), default=None)
    taker = min((i for i in indices if room[i].more >= cut.multiple), key=lambda i: (surplus[i], i), default=None)
    if giver is None or taker is None or surplus[giver] <= surplus[taker]:
        return False
    givers = set(cut.owners[giver]) - set(cut.owners[taker])
    takers = set(cut.owners[taker]) - set(cut.owners[giver])
    gain = sum(over[w] for w in givers) - sum(over[w] for w in takers)
    units = int(gain / (cut.space.unit_cost * (len(givers) + len(takers))))
    owned, stray = cut.owned(), _LARGEST_STRAY * cut.space.num_units / len(cut.sizes)
    for w in givers | takers:
        sign = 1 if w in takers else -1
        units = min(units, int(stray - sign * (owned[w] - cut.shares[w] * cut.space.num_units)))
    # Borders stay aligned: whole multiples move, into and out of an incomplete last one too.
    units = min(units, room[giver].less, room[taker].more, cut.sizes[giver] - 1) // cut.multiple * cut.multiple
    if units <= 0:
        return False
    cut.sizes[giver] -= units
    cut.sizes[taker] += units
    room[giver].less -= units
    room[giver].more += units
    room[taker].less += units
    room[taker].more -= units
    for w in givers:
        over[w] -= units * cut.space.unit_cost
    for w in takers:
        over[w] += units * cut.space.unit_cost
    return True
