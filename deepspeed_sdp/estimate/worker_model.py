"""A worker's model on the meta device with two layers for every kind of layer in it: small at any depth."""

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.adapters.tasks import Task
from deepspeed_sdp.config import SDPConfig, SDPSource
from deepspeed_sdp.engine.zero.rounds import Use, first_places, uses
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import SHARED, Subnetwork, cut_model

# Of layers that are alike the first two are kept: the second one stands for all that follow another layer.
_KEPT = 2


@dataclass(frozen=True)
class Weight:
    """A parameter that a worker trains.

    Attributes:
        local: name in the worker's model, in which layers are numbered as in the full model.
        place: of the full parameter, in forward order.
        start: in the full parameter along its units; several weights may be parts of one.
        owner_set: index in the plan.
        numel: elements.
        in_place: whether it is a view of a full weight (backward masking).
    """

    local: str
    place: int
    start: int
    owner_set: int
    numel: int
    in_place: bool


@dataclass(frozen=True)
class WorkerModel:
    """One worker's subnetwork, or the full model.

    Attributes:
        module: on the meta device, with the layers that were kept.
        task: what it is trained for.
        layers: names of the full model's layers.
        kept: names of the module's layers.
        stand_in: for every layer of the full model, the kept one that is like it.
        kinds: what tells the kept layers from others; workers with the same ones compute alike.
        numels: elements of every full parameter, in forward order.
        first_places, uses: of every part (0 before the layers, ``1 + layer``, and one more after them) the place of
            its first full parameter, and one more for the end; and what uses its weights.
        spaces: the unit space that it falls into, or ``None``.
        trained: what the worker trains, in forward order.
        held: elements of the other parameters, which it computes with and does not train.
        buffer_bytes: of the module's buffers.
    """

    module: nn.Module
    task: Task
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    stand_in: tuple[int, ...]
    kinds: tuple[tuple[Any, ...], ...]
    numels: tuple[int, ...]
    first_places: tuple[int, ...]
    uses: tuple[Use, ...]
    spaces: tuple[str | None, ...]
    trained: tuple[Weight, ...]
    held: int
    buffer_bytes: int

    @property
    def last_part(self) -> int:
        """The part after the layers."""
        return len(self.stand_in) + 1


def worker_model(
    full: nn.Module,
    dtype: torch.dtype,
    sdp: SDPSource | None = None,
    plan: SubnetworkPlan | None = None,
    worker: int = 0,
) -> WorkerModel:
    """The model of ``worker`` under ``plan``, or without one the full model.

    Args:
        full: the full model, on the meta device; it stays as it is.
        dtype: of the weights.
    """
    adapter = find_adapter(full)
    found = adapter.layers(full)
    layers = tuple(layer.name for layer in found)
    kinds = [_kind(plan, worker, f"{layer}.") for layer in layers]
    numbers = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < _KEPT]
    config = adapter.with_layers(cast(Any, full).config, numbers)
    if config is None:  # every layer is of its own kind
        numbers, kinds = list(range(len(layers))), [(*kind, i) for i, kind in enumerate(kinds)]
        config = copy.deepcopy(cast(Any, full).config)
    stand_in = tuple(_stand_in(kinds, numbers, i) for i in range(len(kinds)))
    module = _built(full, config).to(dtype)
    kept = tuple(layer.name for layer in adapter.layers(module))
    renamed = {layers[number]: name for number, name in zip(numbers, kept, strict=True)}
    subnetwork = None
    if plan is not None and sdp is not None:
        subnetwork = _cut(module, SDPConfig.of(sdp), _restricted(plan, renamed), worker)
    names = [name for name, _ in full.named_parameters()]
    places = first_places(names, layers)
    place_of = {id(parameter): place for place, parameter in enumerate(full.parameters())}
    weights = _Weights(
        module, subnetwork, plan, worker, layers, kept, numbers, dict(zip(names, range(len(names)), strict=True))
    )
    trained, held = weights.collect(stand_in)
    return WorkerModel(
        module,
        adapter.task,
        layers,
        kept,
        stand_in,
        tuple(kinds[number] for number in numbers),
        tuple(parameter.numel() for parameter in full.parameters()),
        places,
        tuple(uses(full, [layer.module for layer in found], place_of, places)),
        _spaces(names, places, subnetwork, layers, kept, stand_in),
        tuple(sorted(trained, key=lambda weight: (weight.place, weight.start))),
        held,
        sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()),
    )


def _kind(plan: SubnetworkPlan | None, worker: int, prefix: str) -> tuple[Any, ...]:
    """What tells a layer from others: the widths that a worker owns of its units, and whether they touch."""
    if plan is None:
        return ()
    found = []
    for planned in plan.spaces:
        name = f"{planned.space.name}."
        if name.startswith(prefix):
            owned = plan.owned(planned.space.name, worker)
            touching = tuple(a.stop == b.start for a, b in pairwise(owned))
            widths = tuple(chunk.stop - chunk.start for chunk in owned)
            found.append((name.removeprefix(prefix), len(planned.chunks) > 1, widths, touching))
    return tuple(found)


def _stand_in(kinds: Sequence[Any], kept: Sequence[int], layer: int) -> int:
    if layer in kept:
        return kept.index(layer)
    return max(place for place, index in enumerate(kept) if kinds[index] == kinds[layer])


def _built(full: nn.Module, config: Any) -> nn.Module:
    config.use_cache = False
    model: Any = type(full)
    with torch.device("meta"):
        return model(config)  # type: ignore[no-any-return]


def _restricted(plan: SubnetworkPlan, renamed: Mapping[str, str]) -> SubnetworkPlan:
    """The plan of the kept layers alone, under their new names."""
    spaces = []
    for number, (old, new) in enumerate(renamed.items()):
        for planned in plan.spaces:
            if f"{planned.space.name}.".startswith(f"{old}."):
                name = _renamed(f"{planned.space.name}.", f"{old}.", f"{new}.").removesuffix(".")
                spaces.append(replace(planned, space=replace(planned.space, name=name, layer=number)))
    return replace(plan, spaces=tuple(spaces))


def _cut(module: nn.Module, sdp: SDPConfig, plan: SubnetworkPlan, worker: int) -> Subnetwork:
    is_forward = sdp.masking == "forward"
    return cut_model(
        module,
        plan,
        worker,
        masking=sdp.masking,
        output_scaling=sdp.output_scaling if is_forward else "none",
        block_unit=sdp.block_unit,
        recompute_frozen=sdp.backward.recompute_frozen,
    )


def _spaces(
    names: Sequence[str],
    first_places: Sequence[int],
    subnetwork: Subnetwork | None,
    layers: Sequence[str],
    kept: Sequence[str],
    stand_in: Sequence[int],
) -> tuple[str | None, ...]:
    spaces: list[str | None] = []
    for place, name in enumerate(names):
        part = bisect_right(first_places[:-1], place) - 1
        found = None
        if subnetwork is not None and 0 < part <= len(stand_in):
            old, new = f"{kept[stand_in[part - 1]]}.", f"{layers[part - 1]}."
            full = subnetwork.partitioned.get(_renamed(name, new, old))
            found = _renamed(f"{full.space}.", old, new).removesuffix(".") if full else None
        spaces.append(found)
    return tuple(spaces)


def _renamed(name: str, prefix: str, other: str) -> str:
    return other + name.removeprefix(prefix) if name.startswith(prefix) else name


@dataclass(frozen=True)
class _Weights:
    """Lists the weights of every layer, by the kept one that is like it."""

    module: nn.Module
    subnetwork: Subnetwork | None
    plan: SubnetworkPlan | None
    worker: int
    layers: Sequence[str]
    kept: Sequence[str]
    numbers: Sequence[int]
    places: dict[str, int]

    def collect(self, stand_in: Sequence[int]) -> tuple[list[Weight], int]:
        by_place: dict[int | None, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.module.named_parameters():
            place = next((i for i, layer in enumerate(self.kept) if name.startswith(f"{layer}.")), None)
            by_place.setdefault(place, []).append((name, parameter))
        frozen = self.subnetwork.frozen if self.subnetwork else set()
        trained, held = [], 0
        for layer, place in self._layers(stand_in):
            for name, parameter in by_place.get(place, ()):
                if name in frozen or not parameter.requires_grad:
                    held += parameter.numel()
                else:
                    trained.append(self._weight(name, parameter.numel(), layer, place))
        return trained, held

    def _layers(self, stand_in: Sequence[int]) -> Iterator[tuple[int | None, int | None]]:
        yield None, None
        yield from enumerate(stand_in)

    def _weight(self, local: str, numel: int, layer: int | None, place: int | None) -> Weight:
        fragment = self.subnetwork.fragments[local] if self.subnetwork else None
        old = new = ""
        if place is not None and layer is not None:
            old, new = f"{self.kept[place]}.", f"{self.layers[layer]}."
        full_name = _renamed(fragment.full_name if fragment else local, old, new)
        start, owner_set, in_place = 0, SHARED, False
        if fragment is not None and fragment.dim is not None:
            assert self.subnetwork is not None
            assert self.plan is not None
            assert place is not None
            parameter = self.subnetwork.partitioned[fragment.full_name]
            first = fragment.start // parameter.features_per_unit
            space = f"{parameter.space}."
            like = _renamed(space, old, f"{self.layers[self.numbers[place]]}.").removesuffix(".")
            index = [chunk.start for chunk in self.plan.owned(like, self.worker)].index(first)
            chunk = self.plan.owned(_renamed(space, old, new).removesuffix("."), self.worker)[index]
            start, owner_set = chunk.start * parameter.features_per_unit, chunk.owner_set
            in_place = local in self.subnetwork.views
        return Weight(_renamed(local, old, new), self.places[full_name], start, owner_set, numel, in_place)
