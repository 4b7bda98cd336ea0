"""Unit spaces, what an adapter offers for partitioning, and the chunks they are cut into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Training FLOPs per token of a parameter in a linear layer: 2 in the forward and 4 in the backward pass.
_FLOPS_PER_PARAMETER = 6.0

OwnerSet = tuple[int, ...]
"""The workers that own a unit, ascending."""


@dataclass(frozen=True)
class UnitSpace:
    """A row of interchangeable units inside one module, numbered `0 … num_units-1`.

    Attributes:
        name: module path, e.g. `"model.layers.3.mlp"`; unique within a plan.
        kind: what a unit is: `"mlp"` (a neuron) or `"attention"` (a KV head with its query heads), with
            `num_units = 1` the whole branch; `"layer"` (a whole residual layer, `num_units = 1`).
        layer: index of the residual layer the module belongs to.
        num_units: how many units there are, at least 1.
        unit_numel: parameters of one unit, at least 1.
        unit_flops: training FLOPs per token of one unit at the sequence length of the run (forward and backward);
            0 stands for 6 per parameter.
    """

    name: str
    kind: str
    layer: int
    num_units: int
    unit_numel: int
    unit_flops: float = 0.0

    @property
    def numel(self) -> int:
        """Parameters of the whole space."""
        return self.num_units * self.unit_numel

    @property
    def unit_cost(self) -> float:
        """What a unit counts for in a worker's step time: its training FLOPs per token."""
        return self.unit_flops or _FLOPS_PER_PARAMETER * self.unit_numel


class Chunk(NamedTuple):
    """The units `start … stop-1` of a space, all owned by `plan.owner_sets[owner_set]`."""

    start: int
    stop: int
    owner_set: int


@dataclass(frozen=True)
class PlannedSpace:
    """A unit space cut into chunks: ascending, contiguous, none empty, covering `[0, num_units)`."""

    space: UnitSpace
    chunks: tuple[Chunk, ...]
