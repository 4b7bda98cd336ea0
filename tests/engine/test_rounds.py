"""Rounds and buckets: what every rank must agree on, for random layouts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.plan.rounds import Item, make_buckets, make_rounds

NUMELS = st.lists(st.integers(1, 60), min_size=1, max_size=20)
SIZES = st.integers(1, 200)


@st.composite
def layouts(draw):
    """Sizes of full parameters, and fragments of them, each of some owner set and client group."""
    numels = draw(NUMELS)
    positions = draw(
        st.lists(st.tuples(st.integers(0, len(numels) - 1), st.integers(0, 3)), unique=True, min_size=1, max_size=40)
    )
    items = [
        Item(position, draw(st.integers(0, 5)), draw(st.integers(0, 1)), draw(st.integers(1, 50)), index)
        for index, position in enumerate(positions)
    ]
    return numels, items


@settings(max_examples=300)
@given(NUMELS, SIZES, st.sets(st.integers(0, 20)))
def test_rounds_are_contiguous_backward_no_larger_than_asked_and_full(numels, size, breaks):
    rounds = make_rounds(numels, size, breaks)
    assert rounds[-1] == 0
    assert all(after - before in (0, -1) for before, after in itertools.pairwise(rounds))
    for before, after in itertools.pairwise(range(len(numels))):
        if after in breaks:
            assert rounds[before] != rounds[after]
    totals = [sum(n for n, r in zip(numels, rounds, strict=True) if r == round_) for round_ in range(max(rounds) + 1)]
    for round_, total in enumerate(totals):
        members = [place for place, r in enumerate(rounds) if r == round_]
        assert total <= size or len(members) == 1
        if members[0] > 0 and members[0] not in breaks:
            assert total + numels[members[0] - 1] > size, "closed early"


@settings(max_examples=300)
@given(layouts(), SIZES)
def test_every_parameter_is_in_exactly_one_bucket_of_its_own_round_set_and_group(layout, size):
    numels, items = layout
    rounds = make_rounds(numels, size)
    buckets = make_buckets(items, rounds)
    assert sorted(i for bucket in buckets for i in bucket.items) == sorted(item.parameter for item in items)
    by_index = {item.parameter: item for item in items}
    for bucket in buckets:
        members = [by_index[i] for i in bucket.items]
        assert {(rounds[m.position[0]], m.owner_set, m.group, m.in_place) for m in members} == {bucket.key}
        assert bucket.numels == tuple(m.numel for m in members)
        assert bucket.numel == sum(bucket.numels)


@settings(max_examples=300)
@given(layouts(), SIZES, st.randoms())
def test_the_order_is_total_backward_and_does_not_depend_on_the_input_order(layout, size, random):
    numels, items = layout
    rounds = make_rounds(numels, size)
    buckets = make_buckets(items, rounds)
    keys = [bucket.key for bucket in buckets]
    assert keys == sorted(set(keys)), "strictly ascending: no two buckets could swap"
    position = {item.parameter: item.position for item in items}
    for bucket in buckets:
        backward = [position[i] for i in bucket.items]
        assert backward == sorted(backward, reverse=True)
    shuffled = list(items)
    random.shuffle(shuffled)
    assert make_buckets(shuffled, rounds) == buckets


@settings(max_examples=300)
@given(layouts(), SIZES, st.sets(st.integers(0, 5)))
def test_what_else_a_rank_holds_changes_nothing(layout, size, owned):
    numels, items = layout
    rounds = make_rounds(numels, size)
    everything = make_buckets(items, rounds)
    mine = make_buckets([item for item in items if item.owner_set in owned], rounds)
    assert mine == tuple(bucket for bucket in everything if bucket.owner_set in owned)


@settings(max_examples=200)
@given(layouts(), SIZES, st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=2, max_size=6))
def test_launching_in_order_never_waits_in_a_circle(layout, size, holdings):
    """Ranks that hold different owner sets and block on each bucket until all of its owners are at it."""
    numels, items = layout
    rounds = make_rounds(numels, size)
    queues = [list(make_buckets([i for i in items if i.owner_set in owned], rounds)) for owned in holdings]
    while any(queues):
        heads = {queue[0].key for queue in queues if queue}
        free = [key for key in heads if all(not q or key == q[0].key or key not in {b.key for b in q} for q in queues)]
        assert free, "deadlock"
        for queue in queues:
            if queue and queue[0].key == free[0]:
                queue.pop(0)


@pytest.mark.parametrize(
    ("size", "breaks", "expected"),
    [(10, (), (1, 0, 0)), (4, (), (2, 1, 0)), (100, (), (0, 0, 0)), (100, (1,), (1, 0, 0)), (100, (1, 2), (2, 1, 0))],
)
def test_an_example(size, breaks, expected):
    assert make_rounds([5, 5, 5], size, breaks) == expected
