"""Buckets: what every rank must agree on, for random layouts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.engine.buckets import BucketItem, make_buckets


@st.composite
def layouts(draw):
    """Parameters at different positions, each of some owner set."""
    positions = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), unique=True, min_size=1, max_size=40))
    return [
        BucketItem(position, draw(st.integers(0, 5)), draw(st.integers(1, 50)), index)
        for index, position in enumerate(positions)
    ]


SIZES = st.integers(1, 120)


@settings(max_examples=300, deadline=None)
@given(layouts(), SIZES)
def test_every_parameter_is_in_exactly_one_bucket_of_its_own_set(items, size):
    buckets = make_buckets(items, size)
    assert sorted(i for bucket in buckets for i in bucket.items) == sorted(item.parameter for item in items)
    by_index = {item.parameter: item for item in items}
    for bucket in buckets:
        assert {by_index[i].owner_set for i in bucket.items} == {bucket.owner_set}
        assert bucket.numels == tuple(by_index[i].numel for i in bucket.items)


@settings(max_examples=300, deadline=None)
@given(layouts(), SIZES)
def test_no_bucket_is_too_large_and_none_is_closed_early(items, size):
    buckets = make_buckets(items, size)
    for bucket in buckets:
        assert len(bucket.items) == 1 or sum(bucket.numels) <= size
    for owner_set in {bucket.owner_set for bucket in buckets}:
        mine = [bucket for bucket in buckets if bucket.owner_set == owner_set]
        for bucket, following in itertools.pairwise(mine):
            assert sum(bucket.numels) + following.numels[0] > size


@settings(max_examples=300, deadline=None)
@given(layouts(), SIZES, st.randoms())
def test_the_order_is_total_backward_and_does_not_depend_on_the_input_order(items, size, random):
    buckets = make_buckets(items, size)
    keys = [bucket.key for bucket in buckets]
    assert keys == sorted(set(keys)), "strictly ascending: no two buckets could swap"
    position = {item.parameter: item.position for item in items}
    for bucket in buckets:
        backward = [position[i] for i in bucket.items]
        assert backward == sorted(backward, reverse=True)
        first, start = backward[-1]
        assert bucket.key == (-first, -start, bucket.owner_set)
    shuffled = list(items)
    random.shuffle(shuffled)
    assert make_buckets(shuffled, size) == buckets


@settings(max_examples=300, deadline=None)
@given(layouts(), SIZES, st.sets(st.integers(0, 5)))
def test_what_else_a_rank_holds_changes_nothing(items, size, owned):
    everything = make_buckets(items, size)
    mine = make_buckets([item for item in items if item.owner_set in owned], size)
    assert mine == tuple(bucket for bucket in everything if bucket.owner_set in owned)


@settings(max_examples=200, deadline=None)
@given(layouts(), SIZES, st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=2, max_size=6))
def test_launching_in_order_never_waits_in_a_circle(items, size, holdings):
    """Ranks that hold different owner sets and block on each bucket until all of its owners are at it."""
    queues = [list(make_buckets([i for i in items if i.owner_set in owned], size)) for owned in holdings]
    while any(queues):
        heads = {queue[0].key for queue in queues if queue}
        free = [key for key in heads if all(not q or key == q[0].key or key not in {b.key for b in q} for q in queues)]
        assert free, "deadlock"
        for queue in queues:
            if queue and queue[0].key == free[0]:
                queue.pop(0)


@pytest.mark.parametrize(("size", "expected"), [(10, [(2, 1), (0,)]), (4, [(2,), (1,), (0,)]), (100, [(2, 1, 0)])])
def test_an_example(size, expected):
    items = [BucketItem((i, 0), 0, 5, i) for i in range(3)]
    assert [bucket.items for bucket in make_buckets(items, size)] == expected
