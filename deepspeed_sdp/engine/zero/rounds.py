"""The order of a rank's buckets: rounds in the backward pass, portions in the step, parts at ZeRO-3.

Pure: the engine builds it of buckets with weights, and ``estimate/`` of their shapes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.plan.schedule import Schedule
from deepspeed_sdp.plan.segmentation import Bucket, Item, Segmentation, segment

Shape = TypeVar("Shape", bound=BucketShape)


@dataclass(frozen=True)
class Portion(Generic[Shape]):
    """What is stepped, and then travels, together; the same rounds on all ranks.

    Attributes:
        rounds: indices of its rounds, ascending.
        owned: this rank's buckets in them, by round.
        gathered: this rank's buckets that the owners gather among themselves.
        exchanged: buckets that go to all ranks, those of others included; the same on all ranks.
    """

    rounds: range
    owned: tuple[tuple[Shape, ...], ...]
    gathered: tuple[Shape, ...]
    exchanged: tuple[Shape, ...]


@dataclass(frozen=True)
class Rounds(Generic[Shape]):
    """The buckets that this rank holds.

    Attributes:
        rounds: buckets that it trains, by round, in the total order; empty where it owns nothing.
        copies: under backward masking, buckets of others of which it holds a copy, by round.
        first_places: for every part (see :mod:`~deepspeed_sdp.engine.zero.weights`), the place in forward order of
            its first full parameter, and one more for the end.
        segmentation: the rounds of the full model.
    """

    rounds: tuple[tuple[Shape, ...], ...]
    copies: tuple[tuple[Shape, ...], ...]
    first_places: tuple[int, ...]
    segmentation: Segmentation

    @property
    def buckets(self) -> tuple[Shape, ...]:
        """Those that it trains, in the total order."""
        return tuple(bucket for of_round in self.rounds for bucket in of_round)

    @property
    def parts(self) -> list[range]:
        """The rounds of each part."""
        places = self.first_places
        return [self.segmentation.within(*places[part : part + 2]) for part in range(len(places) - 1)]

    def portions(self, numel: int, *, is_gathered: bool, is_exchanged: bool) -> list[Portion[Shape]]:
        """Consecutive rounds together, up to ``numel`` elements of the full model, in forward order.

        Args:
            is_gathered: whether owners step shards, and gather each other's.
            is_exchanged: whether those who do not own a bucket hold a copy of it.
        """
        return [
            self._portion(rounds, is_gathered, is_exchanged)
            for rounds in reversed(list(self.segmentation.groups(numel)))
        ]

    def _portion(self, rounds: range, is_gathered: bool, is_exchanged: bool) -> Portion[Shape]:
        owned = tuple(self.rounds[round_] for round_ in rounds)
        held = [bucket for round_ in rounds for bucket in (*self.rounds[round_], *self.copies[round_])]
        held.sort(key=lambda bucket: bucket.key)
        exchanged = tuple(b for b in held if is_exchanged and b.is_exchanged)
        gathered = tuple(b for b in held if is_gathered and b.is_owned and not (is_exchanged and b.is_exchanged))
        return Portion(rounds, owned, gathered, exchanged)


def last_portion(portions: Sequence[Portion[Shape]], rounds: range) -> int | None:
    """The last of ``portions`` that holds one of ``rounds``."""
    return max((i for i, portion in enumerate(portions) if set(portion.rounds) & set(rounds)), default=None)


def rounds_of(numels: Sequence[int], first_places: Sequence[int], stage: int, numel: int, ranks: int) -> Segmentation:
    """The rounds of a full model whose parameters have ``numels`` elements, of about ``numel`` each.

    At ZeRO-3 none lies in two parts.
    """
    return segment(numels, numel, first_places if stage == 3 else (), ranks)


def by_round(
    segmentation: Segmentation,
    items: Iterable[Item],
    owners: Sequence[Owners],
    make: Callable[[Sequence[Bucket], Owners], Sequence[Shape]],
) -> tuple[tuple[Shape, ...], ...]:
    """The buckets of ``items``.

    Args:
        owners: by owner set.
        make: of buckets that lie one after the other.
    """
    found: list[list[Shape]] = [[] for _ in segmentation.numels]
    for pieces in segmentation.buckets(items, [len(of_set.ranks) for of_set in owners]):
        for bucket in make(pieces, owners[pieces[0].owner_set]):
            found[bucket.round].append(bucket)
    return tuple(map(tuple, found))


def first_places(order: Sequence[str], layers: Sequence[str]) -> tuple[int, ...]:
    """Where the parts of a model begin: before the layers, each layer, after the layers; and the end.

    Args:
        order: names of the full parameters, in forward order.
        layers: names of the layers.
    """
    inside = [[i for i, name in enumerate(order) if name.startswith(f"{layer}.")] for layer in layers]
    return (0, *(places[0] for places in inside), inside[-1][-1] + 1, len(order))


@dataclass(frozen=True)
class Use:
    """What uses the weights of a part.

    Attributes:
        modules: whose forward pass needs them.
        stays, is_needed_backward: see :class:`~deepspeed_sdp.plan.schedule.Schedule`.
    """

    modules: tuple[nn.Module, ...]
    stays: bool
    is_needed_backward: bool


def uses(
    module: nn.Module, layers: Sequence[nn.Module], place_of: Mapping[int, int], first_places: Sequence[int]
) -> list[Use]:
    """Of every part.

    Args:
        module: a model, cut or not, that has ``layers``.
        place_of: by ``id`` of its parameters, the place of the full parameter in forward order.
    """
    inside = {id(m) for layer in layers for m in layer.modules()}
    users: list[list[nn.Module]] = [[] for _ in range(len(layers) + 2)]
    for submodule in module.modules():
        if id(submodule) not in inside:
            places = [place_of[id(p)] for p in submodule.parameters(recurse=False)]
            for part in sorted({bisect_right(first_places[:-1], place) - 1 for place in places}):
                users[part].append(submodule)
    for index, layer in enumerate(layers):
        users[index + 1] = [layer]
    return [_use(index, modules, first_places) for index, modules in enumerate(users)]


def _use(index: int, modules: Sequence[nn.Module], first_places: Sequence[int]) -> Use:
    if first_places[index] == first_places[index + 1]:
        return Use(tuple(modules), stays=False, is_needed_backward=False)
    is_embedding = all(isinstance(user, nn.Embedding) for user in modules)
    # Tied weights are used again after the layers.
    return Use(tuple(modules), stays=index == 0 and not is_embedding, is_needed_backward=not is_embedding)


def schedule_of(uses: Sequence[Use], prefetch: int) -> Schedule:
    """Of parts whose weights are used so, ``prefetch`` of them ahead."""
    return Schedule(
        len(uses),
        prefetch,
        backward=[index for index, use in enumerate(uses) if use.is_needed_backward],
        stays=[index for index, use in enumerate(uses) if use.stays],
    )
