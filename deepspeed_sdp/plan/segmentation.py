"""How a model falls into pieces that travel together, in a total order that every rank agrees on.

Pure. The full model's parameters fall into *rounds*, contiguous ranges of them in backward order, whose borders depend
on the full model and the bucket size alone. A parameter that is larger than a round is cut at element ranges, into
several rounds of its own. What a rank owns of a round forms one bucket per owner set (and parameter group of the
client). All owners of an owner set hold the same fragments of it, so they build the same buckets; and a rank issues its
buckets in ascending ``key`` order. See docs/internals.md for why that cannot deadlock.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

# A shard's elements are a multiple of this, so that it starts at an aligned address in every dtype.
ALIGNMENT = 8


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
        starts: the element of each of them with which it begins here; 0 but where a round cuts a parameter.
        numels: elements of each of them here, in row-major order.
    """

    round: int
    owner_set: int
    group: int
    in_place: bool
    items: tuple[int, ...]
    starts: tuple[int, ...]
    numels: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """Place in the total order of collectives, ascending."""
        return self.round, self.owner_set, self.group, self.in_place

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(self.numels)

    @property
    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """``(index, start, stop)`` of each of its parameters."""
        for index, start, numel in zip(self.items, self.starts, self.numels, strict=True):
            yield index, start, start + numel


@dataclass(frozen=True)
class Segmentation:
    """The rounds of a full model; the same on all ranks, whatever they own.

    Attributes:
        spans: the rounds of every full parameter, in forward order: one, or where it is cut those that it has alone.
        numels: elements of the full model in every round, apart from what alignment moves between those of a parameter.
    """

    spans: tuple[range, ...]
    numels: tuple[int, ...]

    def groups(self, numel: int) -> Iterator[range]:
        """Consecutive rounds together, up to ``numel`` elements but at least one round, in backward order."""
        first, filled = 0, 0
        for round_, size in enumerate(self.numels):
            if round_ > first and filled + size > numel:
                yield range(first, round_)
                first, filled = round_, 0
            filled += size
        yield range(first, len(self.numels))

    def within(self, first: int, stop: int) -> range:
        """The rounds that hold the full parameters ``[first, stop)``; empty, after those of later ones, for none."""
        if first < stop:
            return range(self.spans[stop - 1].start, self.spans[first].stop)
        end = self.spans[first].stop if first < len(self.spans) else 0
        return range(end, end)

    def buckets(self, items: Iterable[Item], owners: Sequence[int]) -> tuple[tuple[Bucket, ...], ...]:
        """The buckets of one rank's parameters.

        Args:
            owners: ranks of every owner set, by its index.

        Returns:
            tuples of buckets that lie one after the other in one vector: single ones, or the pieces of a parameter that
            is cut, of which all but the last have a multiple of ``owners * ALIGNMENT`` elements. Those of each round
            come in ascending order of their keys.
        """
        ordered = sorted(items, key=lambda item: (self._key(item), [-place for place in item.position]))
        families = ((key, list(members)) for key, members in groupby(ordered, self._key))
        return tuple(
            tuple(_pieces(key, members, self.spans[members[0].position[0]], owners[key[1]]))
            for key, members in families
        )

    def _key(self, item: Item) -> tuple[int, int, int, bool]:
        return self.spans[item.position[0]].start, item.owner_set, item.group, item.in_place


def segment(numels: Sequence[int], round_numel: int, breaks: Iterable[int] = (), ranks: int = 1) -> Segmentation:
    """Cut a full model into rounds.

    Args:
        numels: elements of the full parameters, in forward order.
        round_numel: a round takes at most so many elements of the full model, but as many as its ranks can share.
        breaks: places before which a round must end in forward order: a round never holds both ``place - 1`` and
            ``place``.
        ranks: of the job.
    """
    borders = set(breaks)
    limit = max(round_numel, ALIGNMENT * ranks)
    spans: list[range] = []
    sizes: list[int] = []
    is_open = False
    for place in reversed(range(len(numels))):
        numel = numels[place]
        count = max(-(-numel // limit), 1)
        if count > 1 or not is_open or sizes[-1] + numel > limit or place + 1 in borders:
            spans.append(range(len(sizes), len(sizes) + count))
            sizes += [numel * (piece + 1) // count - numel * piece // count for piece in range(count)]
        else:
            spans.append(range(len(sizes) - 1, len(sizes)))
            sizes[-1] += numel
        is_open = count == 1
    return Segmentation(tuple(reversed(spans)), tuple(sizes))


def shard_numel(numel: int, shards: int) -> int:
    """Elements of each of ``shards`` equal parts, the padding of the last ones included."""
    return -(-numel // (shards * ALIGNMENT)) * ALIGNMENT


def _pieces(key: tuple[int, int, int, bool], members: Sequence[Item], rounds: range, owners: int) -> Iterator[Bucket]:
    if len(rounds) == 1:
        starts, numels = (0,) * len(members), tuple(item.numel for item in members)
        yield Bucket(*key, tuple(item.parameter for item in members), starts, numels)
        return
    total = sum(item.numel for item in members)
    size = shard_numel(total, len(rounds) * owners) * owners
    for round_, low in zip(rounds, range(0, total, size), strict=False):
        found, first = [], 0
        for item in members:
            start, stop = max(low - first, 0), min(low + size - first, item.numel)
            if start < stop:
                found.append((item.parameter, start, stop - start))
            first += item.numel
        items, starts, numels = zip(*found, strict=True)
        yield Bucket(round_, *key[1:], items, starts, numels)
