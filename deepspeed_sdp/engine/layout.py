"""From a subnetwork to its flat buckets: which parameters travel and rest together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deepspeed_sdp.engine.flat_bucket import FlatBucket
from deepspeed_sdp.engine.gather import layers_name
from deepspeed_sdp.engine.groups import OwnerGroups
from deepspeed_sdp.engine.rounds import Item, make_buckets, make_rounds
from deepspeed_sdp.engine.sharded_weights import Part
from deepspeed_sdp.subnetwork import Subnetwork


@dataclass(frozen=True)
class Layout:
    """This rank's buckets.

    Attributes:
        rounds: buckets by round, in the total order; empty where this rank owns nothing.
        names: name in the subnetwork of every parameter, by its index in the buckets.
        first_places: for every part (see :mod:`~deepspeed_sdp.engine.sharded_weights`), the place in forward order of
            its first full parameter, and one more for the end.
        round_of_place: the round of every full parameter.
        numels: elements of every full parameter.
    """

    rounds: tuple[tuple[FlatBucket, ...], ...]
    names: tuple[str, ...]
    first_places: tuple[int, ...]
    round_of_place: tuple[int, ...]
    numels: tuple[int, ...]

    def gathers(self, numel: int) -> list[list[FlatBucket]]:
        """Buckets of consecutive rounds together, up to ``numel`` elements of the full model; equal on all ranks."""
        sizes = [0] * len(self.rounds)
        for place, round_ in enumerate(self.round_of_place):
            sizes[round_] += self.numels[place]
        gathers: list[list[FlatBucket]] = []
        filled = numel
        for size, buckets in zip(sizes, self.rounds, strict=True):
            if filled + size > numel:
                gathers.append([])
                filled = 0
            gathers[-1] += buckets
            filled += size
        return gathers


def make_layout(
    subnetwork: Subnetwork, groups: OwnerGroups, group_of: Mapping[int, int], *, stage: int, round_numel: int
) -> Layout:
    """Move every trained parameter into a flat bucket.

    Args:
        group_of: index of the client's parameter group, by ``id`` of a parameter; others are not trained.
        round_numel: see :func:`make_rounds`.
    """
    numels = _full_numels(subnetwork)
    first_places = _first_places(subnetwork)
    rounds = make_rounds(numels, round_numel, breaks=first_places if stage == 3 else ())
    positions = subnetwork.positions()
    named = [(name, p) for name, p in subnetwork.module.named_parameters() if id(p) in group_of]
    items = [
        Item(positions[name], subnetwork.owner_set(name), group_of[id(p)], p.numel(), index)
        for index, (name, p) in enumerate(named)
    ]
    flats: list[list[FlatBucket]] = [[] for _ in range(max(rounds) + 1)]
    for bucket in make_buckets(items, rounds):
        flats[bucket.round].append(
            FlatBucket(
                bucket,
                [named[index][1] for index in bucket.items],
                groups.ranks(bucket.owner_set),
                groups.rank,
                groups.group(bucket.owner_set),
                is_sharded=stage > 0,
            )
        )
    return Layout(tuple(map(tuple, flats)), tuple(name for name, _ in named), first_places, rounds, tuple(numels))


def make_parts(subnetwork: Subnetwork, layout: Layout) -> list[Part]:
    """The parts that are gathered one at a time at ZeRO-3: before the layers, each layer, after the layers."""
    module = subnetwork.module
    layers = list(subnetwork.adapter.layers(module))
    positions = subnetwork.positions()
    part_of = {
        id(p): _part(positions[name][0], layout.first_places)
        for name, p in module.named_parameters(remove_duplicate=False)
        if name in positions
    }
    inside = {id(m) for layer in layers for m in layer.modules()}
    users: list[list[nn.Module]] = [[] for _ in range(len(layers) + 2)]
    for submodule in module.modules():
        if id(submodule) not in inside:
            for part in sorted({part_of[id(p)] for p in submodule.parameters(recurse=False)}):
                users[part].append(submodule)
    for index, layer in enumerate(layers):
        users[index + 1] = [layer]
    return [_make_part(index, users[index], layout) for index in range(len(users))]


def _make_part(index: int, users: Sequence[nn.Module], layout: Layout) -> Part:
    first, last = layout.first_places[index], layout.first_places[index + 1]
    if first == last:
        end = layout.round_of_place[first] + 1 if first < len(layout.round_of_place) else 0
        return Part(users, (end, end), (), is_needed_backward=False)
    rounds = (layout.round_of_place[last - 1], layout.round_of_place[first] + 1)
    buckets = [flat for round_ in layout.rounds[slice(*rounds)] for flat in round_]
    is_embedding = all(isinstance(user, nn.Embedding) for user in users)
    # Tied weights are used again after the layers.
    stays = index == 0 and not is_embedding
    return Part(users, rounds, buckets, stays=stays, is_needed_backward=not is_embedding)


def _full_numels(subnetwork: Subnetwork) -> list[int]:
    shared = {
        subnetwork.fragments[name].full_name: p.numel()
        for name, p in subnetwork.module.named_parameters()
        if subnetwork.fragments[name].dim is None
    }
    return [
        _product(subnetwork.partitioned[name].shape) if name in subnetwork.partitioned else shared[name]
        for name in subnetwork.full_order
    ]


def _first_places(subnetwork: Subnetwork) -> tuple[int, ...]:
    layers, name = subnetwork.adapter.layers(subnetwork.module), layers_name(subnetwork)
    order = subnetwork.full_order
    places = [
        [i for i, full in enumerate(order) if full.startswith(f"{name}.{layer}.")] for layer in range(len(layers))
    ]
    return (0, *(inside[0] for inside in places), places[-1][-1] + 1, len(order))


def _part(place: int, first_places: Sequence[int]) -> int:
    return next(index for index in reversed(range(len(first_places) - 1)) if first_places[index] <= place)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
