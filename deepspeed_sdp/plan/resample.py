"""The same subnetworks of other units: a plan whose owner sets move on over the units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random
from typing import TYPE_CHECKING, Literal, TypeVar

from deepspeed_sdp.plan.units import Chunk, PlannedSpace

if TYPE_CHECKING:
    from deepspeed_sdp.plan.plan import SubnetworkPlan

Resample = Literal["rotate", "random"]
T = TypeVar("T")


def resampled(plan: SubnetworkPlan, round_: int, how: Resample) -> SubnetworkPlan:
    """``plan`` in a round from 0 on; round 0 is the plan itself.

    Chunks keep their sizes and owner sets, and change their places within a space; blocks, which are spaces of one
    unit, change owner sets among those of their kind and size. So every worker has as many units of every space, or
    blocks, as before, there are no other owner sets, and so no other process groups.
    """
    if round_ == 0:
        return plan
    orders = _Orders(round_, how, plan.seed)
    spaces = [_moved(planned, orders) for planned in plan.spaces]
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, planned in enumerate(plan.spaces):
        if planned.space.num_units == 1:
            alike[planned.space.kind, planned.space.unit_numel].append(place)
    for (kind, numel), places in alike.items():
        dealt = orders.of([plan.spaces[place].chunks for place in places], f"{kind} of {numel}")
        for place, chunks in zip(places, dealt, strict=True):
            spaces[place] = PlannedSpace(plan.spaces[place].space, chunks)
    return replace(plan, spaces=tuple(spaces))


class _Orders:
    def __init__(self, round_: int, how: Resample, seed: int) -> None:
        self._round, self._how, self._seed = round_, how, seed

    def of(self, items: Sequence[T], name: str) -> list[T]:
        if self._how == "rotate":
            first = -self._round % len(items)
            return [*items[first:], *items[:first]]
        # Text, and not its hash, which differs from process to process.
        return Random(f"{self._seed} {self._round} {name}").sample(items, len(items))


def _moved(planned: PlannedSpace, orders: _Orders) -> PlannedSpace:
    pieces = orders.of(planned.chunks, planned.space.name)
    borders = pairwise(accumulate((chunk.stop - chunk.start for chunk in pieces), initial=0))
    chunks: list[Chunk] = []
    for (start, stop), piece in zip(borders, pieces, strict=True):
        # Neighbours of one set are one chunk.
        if chunks and chunks[-1].owner_set == piece.owner_set:
            start = chunks.pop().start
        chunks.append(Chunk(start, stop, piece.owner_set))
    return PlannedSpace(planned.space, tuple(chunks))
