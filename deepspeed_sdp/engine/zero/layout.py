"""From a subnetwork to its buckets: which parameters travel and rest together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.comm.mesh import OwnerGroups, Owners
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket, flat_buckets
from deepspeed_sdp.engine.zero.in_place_bucket import InPlaceBucket
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.zero.part import Part
from deepspeed_sdp.engine.zero.rounds import Rounds, by_round, first_places, rounds_of, uses
from deepspeed_sdp.plan.segmentation import Bucket, Item
from deepspeed_sdp.subnetwork import Subnetwork


@dataclass(frozen=True)
class Layout(Rounds[OwnerBucket]):
    """The buckets that this rank holds.

    Attributes:
        parameters: those it trains, by their index in the buckets.
        names: their names in the subnetwork.
    """

    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]


def make_layout(
    subnetwork: Subnetwork,
    groups: OwnerGroups,
    group_of: Mapping[int, int],
    *,
    stage: int,
    round_numel: int,
    is_apart: bool = False,
) -> Layout:
    """Put every trained parameter, and every copy of one, into a bucket.

    Args:
        group_of: index of the client's parameter group, by ``id`` of a parameter; others are not trained.
        round_numel: elements of the full model in a round.
        is_apart: whether workers train apart, each with a state of its own.
    """
    subnetwork.link_views()
    places = _first_places(subnetwork)
    segmentation = rounds_of(_full_numels(subnetwork), places, stage, round_numel, len(groups.workers))
    positions = subnetwork.positions()
    trained = [(name, p) for name, p in subnetwork.module.named_parameters() if id(p) in group_of]
    items = [
        Item(positions[name], subnetwork.owner_set(name), group_of[id(p)], p.numel(), index, name in subnetwork.views)
        for index, (name, p) in enumerate(trained)
    ]
    copies = list(_copies(subnetwork)) if subnetwork.masking == "backward" else []
    owners = [groups.owners(owner_set) for owner_set in range(len(subnetwork.plan.owner_sets))]
    owners = [of_set.apart() for of_set in owners] if is_apart else owners

    def build(items: Sequence[Item], weights: Sequence[Any]) -> tuple[tuple[OwnerBucket, ...], ...]:
        def make(pieces: Sequence[Bucket], of: Owners) -> Sequence[OwnerBucket]:
            if pieces[0].in_place:
                return [InPlaceBucket(bucket, [weights[i] for i in bucket.items], of, stage > 0) for bucket in pieces]
            return flat_buckets(pieces, weights, of, stage > 0)

        return by_round(segmentation, items, owners, make)

    parameters = [parameter for _, parameter in trained]
    return Layout(
        build(items, parameters),
        build([item for item, _ in copies], [weights for _, weights in copies]),
        places,
        segmentation,
        tuple(parameters),
        tuple(name for name, _ in trained),
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
    module, positions = subnetwork.module, subnetwork.positions()
    place_of = {
        id(p): positions[name][0] for name, p in module.named_parameters(remove_duplicate=False) if name in positions
    }
    layers = [layer.module for layer in subnetwork.adapter.layers(module)]
    found = uses(module, layers, place_of, layout.first_places)
    return [
        Part(use, rounds, [b for round_ in rounds for b in layout.rounds[round_] if isinstance(b, FlatBucket)])
        for use, rounds in zip(found, layout.parts, strict=True)
    ]


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
    return first_places(subnetwork.full_order, subnetwork.layer_names)
