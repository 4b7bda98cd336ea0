"""From a subnetwork to its buckets: which parameters travel and rest together."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.full.gather import layers_name
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket, flat_buckets
from deepspeed_sdp.engine.zero.in_place_bucket import InPlaceBucket
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.zero.part import Part
from deepspeed_sdp.engine.zero.refresh import Portion
from deepspeed_sdp.plan.segmentation import Item, Segmentation, segment
from deepspeed_sdp.subnetwork import SHARED, Subnetwork


@dataclass(frozen=True)
class Layout:
    """The buckets that this rank holds.

    Attributes:
        rounds: buckets that it trains, by round, in the total order; empty where it owns nothing.
        copies: under backward masking, buckets of others of which it holds a copy, by round.
        parameters: those it trains, by their index in the buckets.
        names: their names in the subnetwork.
        first_places: for every part (see :mod:`~deepspeed_sdp.engine.zero.weights`), the place in forward order of
            its first full parameter, and one more for the end.
        segmentation: the rounds of the full model.
    """

    rounds: tuple[tuple[OwnerBucket, ...], ...]
    copies: tuple[tuple[OwnerBucket, ...], ...]
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    first_places: tuple[int, ...]
    segmentation: Segmentation

    def portions(self, numel: int, *, is_gathered: bool, is_exchanged: bool) -> list[Portion]:
        """Consecutive rounds together, up to ``numel`` elements of the full model, in forward order.

        Args:
            is_gathered: whether owners step shards, and gather each other's.
            is_exchanged: whether those who do not own a bucket hold a copy of it.
        """
        return [
            self._portion(rounds, is_gathered, is_exchanged)
            for rounds in reversed(list(self.segmentation.groups(numel)))
        ]

    def _portion(self, rounds: range, is_gathered: bool, is_exchanged: bool) -> Portion:
        owned = tuple(self.rounds[round_] for round_ in rounds)
        held = [bucket for round_ in rounds for bucket in (*self.rounds[round_], *self.copies[round_])]
        held.sort(key=lambda bucket: bucket.key)
        exchanged = [b for b in held if is_exchanged and _is_exchanged(b)]
        gathered = [b for b in held if is_gathered and b not in exchanged and isinstance(b, FlatBucket)]
        return Portion(rounds, owned, tuple(gathered), tuple(exchanged))


def _is_exchanged(bucket: OwnerBucket) -> bool:
    """What everyone owns is gathered like any weight, but where only the exchange knows where it lies."""
    return isinstance(bucket, InPlaceBucket) or bucket.owner_set != SHARED


def make_layout(
    subnetwork: Subnetwork, groups: OwnerGroups, group_of: Mapping[int, int], *, stage: int, round_numel: int
) -> Layout:
    """Put every trained parameter, and every copy of one, into a bucket.

    Args:
        group_of: index of the client's parameter group, by ``id`` of a parameter; others are not trained.
        round_numel: see :func:`segment`.
    """
    subnetwork.link_views()
    first_places = _first_places(subnetwork)
    breaks = first_places if stage == 3 else ()
    segmentation = segment(_full_numels(subnetwork), round_numel, breaks, len(groups.workers))
    positions = subnetwork.positions()
    trained = [(name, p) for name, p in subnetwork.module.named_parameters() if id(p) in group_of]
    items = [
        Item(positions[name], subnetwork.owner_set(name), group_of[id(p)], p.numel(), index, name in subnetwork.views)
        for index, (name, p) in enumerate(trained)
    ]
    copies = list(_copies(subnetwork)) if subnetwork.masking == "backward" else []
    owners = [len(groups.ranks(owner_set)) for owner_set in range(len(subnetwork.plan.owner_sets))]

    def build(items: Sequence[Item], weights: Sequence[Any]) -> tuple[tuple[OwnerBucket, ...], ...]:
        by_round: list[list[OwnerBucket]] = [[] for _ in segmentation.numels]
        for pieces in segmentation.buckets(items, owners):
            of = groups.owners(pieces[0].owner_set)
            made: Sequence[OwnerBucket] = (
                [InPlaceBucket(bucket, [weights[i] for i in bucket.items], of, stage > 0) for bucket in pieces]
                if pieces[0].in_place
                else flat_buckets(pieces, weights, of, stage > 0)
            )
            for bucket in made:
                by_round[bucket.round].append(bucket)
        return tuple(map(tuple, by_round))

    parameters = [parameter for _, parameter in trained]
    return Layout(
        build(items, parameters),
        build([item for item, _ in copies], [weights for _, weights in copies]),
        tuple(parameters),
        tuple(name for name, _ in trained),
        first_places,
        segmentation,
    )


def _copies(subnetwork: Subnetwork) -> Iterator[tuple[Item, torch.Tensor]]:
    """What others train and this rank computes with: as they see it, and the weights here."""
    place_of = {name: place for place, name in enumerate(subnetwork.full_order)}
    index = 0
    for name, full in subnetwork.partitioned.items():
        if not subnetwork.is_trained(name):
            continue
        parameter = subnetwork.module.get_parameter(name)
        fragments = list(full.fragments(subnetwork.plan))
        for fragment in fragments:
            if subnetwork.index in subnetwork.plan.owner_sets[fragment.owner_set]:
                continue
            in_place = len(fragments) > 1
            weights = full.part_of(parameter.detach(), fragment) if in_place else parameter
            position = (place_of[name], fragment.start)
            group = subnetwork.group_of[name]
            yield Item(position, fragment.owner_set, group, weights.numel(), index, in_place), weights
            index += 1


def make_parts(subnetwork: Subnetwork, layout: Layout) -> list[Part]:
    """The parts that are gathered one at a time at ZeRO-3: before the layers, each layer, after the layers."""
    module = subnetwork.module
    layers = list(subnetwork.adapter.layers(module))
    positions = subnetwork.positions()
    part_of = {
        id(p): bisect_right(layout.first_places[:-1], positions[name][0]) - 1
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
    first, stop = layout.first_places[index : index + 2]
    rounds = layout.segmentation.within(first, stop)
    if first == stop:
        return Part(users, rounds, (), is_needed_backward=False)
    buckets = [b for round_ in rounds for b in layout.rounds[round_] if isinstance(b, FlatBucket)]
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
        math.prod(subnetwork.partitioned[name].shape) if name in subnetwork.partitioned else shared[name]
        for name in subnetwork.full_order
    ]


def _first_places(subnetwork: Subnetwork) -> tuple[int, ...]:
    layers, name = subnetwork.adapter.layers(subnetwork.module), layers_name(subnetwork)
    order = subnetwork.full_order
    places = [
        [i for i, full in enumerate(order) if full.startswith(f"{name}.{layer}.")] for layer in range(len(layers))
    ]
    return (0, *(inside[0] for inside in places), places[-1][-1] + 1, len(order))
