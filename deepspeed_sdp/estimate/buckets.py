"""The rounds and buckets that a worker's engine will make, as numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.worker_model import Weight, WorkerModel
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.plan.rounds import Item, make_buckets, make_rounds

# As in ``engine/zero/owner_bucket.py``.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Bucket:
    """Weights of one owner set that travel together.

    Attributes:
        round: its place in the backward pass.
        weights: in it.
        owners: ranks that own it.
        replicas: of each worker among them.
        shards: so many ranks hold a part of its state each.
        in_place: whether its weights lie in larger ones.
    """

    round: int
    weights: tuple[Weight, ...]
    owners: int
    replicas: int
    shards: int
    in_place: bool

    @cached_property
    def numel(self) -> int:
        """Elements."""
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def shard(self) -> int:
        """Elements of a shard, padding included; a whole one falls into slices."""
        pieces = self.shards if self.shards > 1 else self.replicas
        return -(-self.numel // (pieces * _ALIGNMENT)) * _ALIGNMENT * pieces // self.shards

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
    round_of: of every full parameter.
    first_round: of every part.
    portions: rounds that are stepped together, in the order of the step.
    """

    rounds: tuple[tuple[Bucket, ...], ...]
    round_of: tuple[int, ...]
    first_round: tuple[int, ...]
    portions: tuple[tuple[int, ...], ...]

    @property
    def buckets(self) -> Iterator[Bucket]:
        """All of them."""
        return (bucket for of_round in self.rounds for bucket in of_round)


def make_layout(model: WorkerModel, plan: SubnetworkPlan, job: Job) -> Layout:
    """What ``engine/zero/layout.py`` makes of a worker's weights."""
    replicas = job.world_size // plan.num_subnetworks
    breaks = [place for place, (a, b) in enumerate(pairwise(model.parts), start=1) if a != b] if job.stage == 3 else []
    rounds = make_rounds(model.numels, job.round_numel, breaks)
    items = [
        Item((weight.place, weight.start), weight.owner_set, 0, weight.numel, index, weight.in_place)
        for index, weight in enumerate(model.trained)
    ]
    by_round: list[list[Bucket]] = [[] for _ in range(max(rounds) + 1)]
    for found in make_buckets(items, rounds):
        owners = replicas * len(plan.owner_sets[found.owner_set])
        weights = tuple(model.trained[index] for index in found.items)
        by_round[found.round].append(
            Bucket(found.round, weights, owners, replicas, owners if job.stage else 1, found.in_place)
        )
    first_round = tuple(
        min((r for r, p in zip(rounds, model.parts, strict=True) if p == part), default=max(rounds) + 1)
        for part in range(model.last_part + 1)
    )
    return Layout(tuple(map(tuple, by_round)), rounds, first_round, _portions(model.numels, rounds, job.portion_numel))


def _portions(numels: tuple[int, ...], rounds: tuple[int, ...], limit: int) -> tuple[tuple[int, ...], ...]:
    sizes = [0] * (max(rounds) + 1)
    for numel, round_ in zip(numels, rounds, strict=True):
        sizes[round_] += numel
    portions: list[tuple[int, ...]] = []
    current: list[int] = []
    filled = 0
    for round_, size in enumerate(sizes):
        if current and filled + size > limit:
            portions.append(tuple(current))
            current, filled = [], 0
        current.append(round_)
        filled += size
    portions.append(tuple(current))
    return tuple(reversed(portions))
