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
        dim: the dimension that is cut; ``None`` for a shared parameter, held whole.
        start, stop: half-open range along ``dim`` in the full parameter.
    """

    full_name: str
    owner_set: int
    dim: int | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class FullParameter:
    """A parameter of the full model that falls into units.

    Attributes:
        name: HuggingFace name.
        shape: full shape.
        dim: dimension along which units lie.
        features_per_unit: width of one unit along ``dim``.
        space: name of its unit space.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    features_per_unit: int
    space: str

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
        return Fragment(self.name, owner_set, self.dim, first_unit * width, last_unit * width)

    def whole(self) -> Fragment:
        """All of it, as one fragment."""
        return Fragment(self.name, SHARED, self.dim, 0, self.shape[self.dim])

    def fragment_shape(self, fragment: Fragment) -> tuple[int, ...]:
        """Shape of the tensor that holds ``fragment``."""
        shape = list(self.shape)
        shape[self.dim] = fragment.stop - fragment.start
        return tuple(shape)


def place(full: torch.Tensor, fragment: Fragment, value: torch.Tensor) -> None:
    """Write ``value`` where ``fragment`` lies in ``full``."""
    assert fragment.dim is not None
    full.narrow(fragment.dim, fragment.start, fragment.stop - fragment.start).copy_(value)


def partitioned_by_space(parameters: Mapping[str, FullParameter]) -> dict[str, list[FullParameter]]:
    """The partitioned parameters of each unit space, in forward order."""
    spaces: dict[str, list[FullParameter]] = {}
    for parameter in parameters.values():
        spaces.setdefault(parameter.space, []).append(parameter)
    return spaces
