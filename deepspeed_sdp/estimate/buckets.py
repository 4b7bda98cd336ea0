"""The rounds and buckets that a worker's engine will make, as numbers."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.worker_model import Weight, WorkerModel
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.plan.segmentation import Item, Segmentation, segment, shard_numel


@dataclass(frozen=True)
class Bucket:
    """Weights of one owner set that travel together.

    Attributes:
        round: its place in the backward pass.
        weights: in it, or cut by it.
        ends: those whose last element is in it.
        numel: elements.
        owners: ranks that own it.
        replicas: of each worker among them.
        shards: so many ranks hold a part of its state each.
        in_place: whether its weights lie in larger ones.
    """

    round: int
    weights: tuple[Weight, ...]
    ends: tuple[Weight, ...]
    numel: int
    owners: int
    replicas: int
    shards: int
    in_place: bool

    @property
    def shard(self) -> int:
        """Elements of a shard, padding included; a whole one falls into slices."""
        pieces = self.shards if self.shards > 1 else self.replicas
        return shard_numel(self.numel, pieces) * pieces // self.shards

    @property
    def padded(self) -> int:
        """Elements of all shards."""
        return self.shard * self.shards

    @property
    def brought(self) -> int:
        """Elements in the buffers of an all-to-all that gathers it, or of the all-gather inside that comes after."""
        return 2 * (self.padded - self.shard) if self.replicas == 1 else self.padded + self.padded // self.replicas


@dataclass(frozen=True)
class Layout:
    """Attributes:
    rounds: the buckets of each round, in the total order.
    segmentation: the rounds of the full model.
    first_round: of every part.
    portions: rounds that are stepped together, in the order of the step.
    """

    rounds: tuple[tuple[Bucket, ...], ...]
    segmentation: Segmentation
    first_round: tuple[int, ...]
    portions: tuple[range, ...]

    @property
    def buckets(self) -> Iterator[Bucket]:
        """All of them."""
        return (bucket for of_round in self.rounds for bucket in of_round)


def make_layout(model: WorkerModel, plan: SubnetworkPlan, job: Job) -> Layout:
    """What ``engine/zero/layout.py`` makes of a worker's weights."""
    replicas = job.world_size // plan.num_subnetworks
    breaks = [place for place, (a, b) in enumerate(pairwise(model.parts), start=1) if a != b] if job.stage == 3 else []
    segmentation = segment(model.numels, job.round_numel, breaks, job.world_size)
    items = [
        Item((weight.place, weight.start), weight.owner_set, 0, weight.numel, index, weight.in_place)
        for index, weight in enumerate(model.trained)
    ]
    by_round: list[list[Bucket]] = [[] for _ in segmentation.numels]
    owners_of = [replicas * len(owners) for owners in plan.owner_sets]
    for found in (bucket for pieces in segmentation.buckets(items, owners_of) for bucket in pieces):
        owners = owners_of[found.owner_set]
        weights = tuple(model.trained[index] for index in found.items)
        ends = tuple(model.trained[index] for index, _, stop in found.ranges if stop == model.trained[index].numel)
        shards = owners if job.stage else 1
        by_round[found.round].append(
            Bucket(found.round, weights, ends, found.numel, owners, replicas, shards, found.in_place)
        )
    places = [(bisect_left(model.parts, p), bisect_right(model.parts, p)) for p in range(model.last_part + 1)]
    return Layout(
        tuple(map(tuple, by_round)),
        segmentation,
        tuple(segmentation.within(*of_part).start for of_part in places),
        tuple(reversed(list(segmentation.groups(job.portion_numel)))),
    )
