"""Chunks: the pieces a unit space is cut into."""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed_sdp.plan.units import UnitSpace


@dataclass(frozen=True)
class Chunk:
    """The units `start … stop-1` of a space, all owned by `plan.owner_sets[owner_set]`."""

    start: int
    stop: int
    owner_set: int


@dataclass(frozen=True)
class PlannedSpace:
    """A unit space cut into chunks: ascending, contiguous, none empty, covering `[0, num_units)`."""

    space: UnitSpace
    chunks: tuple[Chunk, ...]
