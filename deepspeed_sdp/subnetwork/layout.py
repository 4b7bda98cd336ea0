"""Where every parameter of a subnetwork lies in the full model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from deepspeed_sdp.plan import SubnetworkPlan

SHARED = 0  # index of the owner set of all workers in every plan


@dataclass(frozen=True)
class Fragment:
    """What one parameter of a subnetwork is of the full model.

    Attributes:
        full_name: HuggingFace name of the full parameter.
        owner_set: index into ``plan.owner_sets``; 0 is the set of all workers.
        dim: the dimension that is cut, in the full parameter's ``unit_shape``; ``None`` for a shared one, held whole.
        start, stop: half-open range along ``dim``.
    """

    full_name: str
    owner_set: int
    dim: int | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class FullParameter:
    """A parameter, or a buffer, of the full model that falls into units.

    Attributes:
        name: HuggingFace name.
        shape: full shape.
        dim: dimension along which units lie.
        features_per_unit: width of one unit along ``dim``.
        space: name of its unit space.
        groups: ``dim`` is so many equal parts, each with features of all units.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    features_per_unit: int
    space: str
    groups: int = 1

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``shape`` seen so that consecutive units are one range: with ``groups`` as a dimension of their own."""
        if self.groups == 1:
            return self.shape
        split = (self.groups, self.shape[self.dim] // self.groups)
        return (*self.shape[: self.dim], *split, *self.shape[self.dim + 1 :])

    @property
    def unit_dim(self) -> int:
        """The dimension of ``unit_shape`` along which units lie."""
        return self.dim + (self.groups > 1)

    def fragments(self, plan: SubnetworkPlan) -> Iterator[Fragment]:
        """All fragments of this parameter, over all workers, in ascending order."""
        for planned in plan.spaces:
            if planned.space.name == self.space:
                for chunk in planned.chunks:
                    yield self.fragment(chunk.start, chunk.stop, chunk.owner_set)
                return

    def fragment(self, first_unit: int, last_unit: int, owner_set: int) -> Fragment:
        """The fragment that holds units ``[first_unit, last_unit)``."""
        width = self.features_per_unit
        return Fragment(self.name, owner_set, self.unit_dim, first_unit * width, last_unit * width)

    def whole(self) -> Fragment:
        """All of it, as one fragment."""
        return Fragment(self.name, SHARED, self.unit_dim, 0, self.unit_shape[self.unit_dim])

    def fragment_shape(self, fragment: Fragment) -> tuple[int, ...]:
        """Shape of the tensor that holds ``fragment``."""
        shape = list(self.unit_shape)
        shape[self.unit_dim] = fragment.stop - fragment.start
        return tuple(shape)

    def part_of(self, full: torch.Tensor, fragment: Fragment) -> torch.Tensor:
        """The view of ``full``, a tensor of this parameter, that is ``fragment``."""
        return full.view(self.unit_shape).narrow(self.unit_dim, fragment.start, fragment.stop - fragment.start)


def partitioned_by_space(parameters: Mapping[str, FullParameter]) -> dict[str, list[FullParameter]]:
    """The partitioned parameters of each unit space, in forward order."""
    spaces: dict[str, list[FullParameter]] = {}
    for parameter in parameters.values():
        spaces.setdefault(parameter.space, []).append(parameter)
    return spaces
