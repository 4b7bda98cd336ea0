"""Unit spaces: what an adapter offers for partitioning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnitSpace:
    """A row of interchangeable units inside one module, numbered `0 … num_units-1`.

    Attributes:
        name: module path, e.g. `"model.layers.3.mlp"`; unique within a plan.
        kind: what a unit is: `"mlp"` (a neuron) or `"attention"` (a KV head with its query heads).
        layer: index of the residual layer the module belongs to.
        num_units: how many units there are, at least 1.
        unit_numel: parameters of one unit, at least 1.
    """

    name: str
    kind: str
    layer: int
    num_units: int
    unit_numel: int

    @property
    def numel(self) -> int:
        """Parameters of the whole space."""
        return self.num_units * self.unit_numel
