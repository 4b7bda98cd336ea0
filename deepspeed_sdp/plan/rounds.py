"""Gradient buckets, in a total order that every rank agrees on.

Pure. The full model's parameters fall into *rounds*, contiguous ranges of them in backward order, whose borders depend
on the full model and the bucket size alone. What a rank owns of a round forms one bucket per owner set (and parameter
group of the client). All owners of an owner set hold the same fragments of it, so they build the same buckets; and a
rank issues its buckets in ascending ``key`` order. See docs/architecture.md for why that cannot deadlock.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """A parameter of a subnetwork as the layout sees it.

    Attributes:
        position: (place of the full parameter in forward order, start in it); equal on all ranks.
        owner_set: index of its owner set.
        group: index of the client's parameter group.
        numel: elements.
        parameter: the caller's own index of it.
        in_place: whether it is a part of a larger weight that stays where it is; equal on all ranks.
    """

    position: tuple[int, int]
    owner_set: int
    group: int
    numel: int
    parameter: int
    in_place: bool = False


class Bucket(NamedTuple):
    """Gradients that travel together.

    Attributes:
        round: place in the backward pass, 0 first.
        owner_set: index of the owner set.
        group: index of the client's parameter group.
        in_place: of all its parameters.
        items: indices of the parameters, in backward order.
        numels: elements of each of them.
    """

    round: int
    owner_set: int
    group: int
    in_place: bool
    items: tuple[int, ...]
    numels: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """Place in the total order of collectives, ascending."""
        return self.round, self.owner_set, self.group, self.in_place

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(self.numels)


def make_rounds(numels: Sequence[int], round_numel: int, breaks: Iterable[int] = ()) -> tuple[int, ...]:
    """The round of every full parameter.

    Args:
        numels: elements of the full parameters, in forward order.
        round_numel: a round takes at most so many elements of the full model; a larger parameter is one of its own.
        breaks: places before which a round must end in forward order: a round never holds both ``place - 1`` and
            ``place``.

    Returns:
        round index per place, 0 for the parameters whose gradients come first.
    """
    borders = set(breaks)
    rounds = [0] * len(numels)
    current, filled = 0, 0
    for place in reversed(range(len(numels))):
        if filled and (filled + numels[place] > round_numel or place + 1 in borders):
            current, filled = current + 1, 0
        rounds[place] = current
        filled += numels[place]
    return tuple(rounds)


def make_buckets(items: Iterable[Item], rounds: Sequence[int]) -> tuple[Bucket, ...]:
    """The buckets of one rank's parameters, in the total order."""
    members: dict[tuple[int, int, int, bool], list[Item]] = {}
    for item in items:
        members.setdefault((rounds[item.position[0]], item.owner_set, item.group, item.in_place), []).append(item)
    return tuple(_bucket(key, members[key]) for key in sorted(members))


def _bucket(key: tuple[int, int, int, bool], members: Sequence[Item]) -> Bucket:
    ordered = sorted(members, key=lambda item: item.position, reverse=True)
    return Bucket(*key, tuple(item.parameter for item in ordered), tuple(item.numel for item in ordered))
