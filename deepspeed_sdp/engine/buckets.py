"""Gradient buckets, in a total order that every rank agrees on.

Pure: borders and order depend on the plan and the full model alone, never on what else a rank holds. All owners of an
owner set hold the same parameters of it, so they build the same buckets; and every rank issues its buckets in ascending
``key`` order. See docs/architecture.md for why that cannot deadlock.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class BucketItem(NamedTuple):
    """A parameter as the bucket layout sees it.

    Attributes:
        position: where the parameter stands in the full model, in forward order; equal on all ranks.
        owner_set: index of its owner set.
        numel: elements.
        parameter: the caller's own index of it.
    """

    position: tuple[int, int]
    owner_set: int
    numel: int
    parameter: int


class Bucket(NamedTuple):
    """Gradients that travel together: one owner set, one collective.

    Attributes:
        key: place in the total order, ascending: earliest complete in the backward pass first, then owner set.
        owner_set: index of the owner set.
        items: indices of the parameters, in backward order.
        numels: elements of each of them.
    """

    key: tuple[int, int, int]
    owner_set: int
    items: tuple[int, ...]
    numels: tuple[int, ...]


def make_buckets(items: Iterable[BucketItem], bucket_numel: int) -> tuple[Bucket, ...]:
    """Fill buckets of at most ``bucket_numel`` elements, per owner set in backward order.

    A parameter larger than a bucket gets one of its own.
    """
    by_set: dict[int, list[BucketItem]] = {}
    for item in items:
        by_set.setdefault(item.owner_set, []).append(item)
    buckets = [
        _bucket(owner_set, chunk)
        for owner_set, members in by_set.items()
        for chunk in _fill(sorted(members, key=lambda item: item.position, reverse=True), bucket_numel)
    ]
    return tuple(sorted(buckets, key=lambda bucket: bucket.key))


def _fill(members: Sequence[BucketItem], bucket_numel: int) -> Iterable[list[BucketItem]]:
    current: list[BucketItem] = []
    filled = 0
    for item in members:
        if current and filled + item.numel > bucket_numel:
            yield current
            current, filled = [], 0
        current.append(item)
        filled += item.numel
    if current:
        yield current


def _bucket(owner_set: int, members: Sequence[BucketItem]) -> Bucket:
    # The member nearest to the input is the last whose gradient comes; the bucket is complete with it.
    first, start = members[-1].position
    key = (-first, -start, owner_set)
    return Bucket(key, owner_set, tuple(m.parameter for m in members), tuple(m.numel for m in members))
