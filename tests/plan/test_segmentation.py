"""Rounds, groups of them and buckets: what every rank must agree on, for random layouts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.plan.segmentation import ALIGNMENT, Item, segment

NUMELS = st.lists(st.integers(1, 60), min_size=1, max_size=20)
SIZES = st.integers(1, 200)
SETS = 6


@st.composite
def layouts(draw, largest=50):
    """Sizes of full parameters, and fragments of them, each of some owner set and client group; owners of the sets."""
    numels = draw(st.lists(st.integers(1, largest), min_size=1, max_size=20))
    positions = draw(
        st.lists(st.tuples(st.integers(0, len(numels) - 1), st.integers(0, 3)), unique=True, min_size=1, max_size=40)
    )
    groups = [draw(st.integers(0, 1)) for _ in numels]
    items = [
        Item(position, draw(st.integers(0, SETS - 1)), groups[position[0]], draw(st.integers(1, largest)), index)
        for index, position in enumerate(positions)
    ]
    return numels, items, [draw(st.integers(1, 3)) for _ in range(SETS)]


LAYOUTS = layouts() | layouts(largest=2000)


def flat(buckets):
    """In the order of their launch."""
    return sorted((bucket for pieces in buckets for bucket in pieces), key=lambda bucket: bucket.key)


@settings(max_examples=300)
@given(NUMELS, SIZES, st.sets(st.integers(0, 20)), st.integers(1, 4))
def test_rounds_are_contiguous_backward_and_never_larger_than_asked(numels, size, breaks, ranks):
    cut = segment(numels, size, breaks, ranks)
    limit = max(size, ALIGNMENT * ranks)
    assert sum(cut.numels) == sum(numels)
    assert max(cut.numels) <= limit
    assert cut.spans[-1].start == 0
    assert cut.spans[0].stop == len(cut.numels)
    for place, (before, after) in enumerate(itertools.pairwise(cut.spans), start=1):
        assert before.start in (after.start, after.stop)
        if before == after:
            assert len(after) == 1, "what is cut has its rounds alone"
            assert place not in breaks
        elif place not in breaks and len(before) == len(after) == 1:
            assert cut.numels[after.start] + numels[place - 1] > limit, "closed early"
    for numel, span in zip(numels, cut.spans, strict=True):
        assert len(span) == max(-(-numel // limit), 1), "in no more rounds than it takes"


@settings(max_examples=200)
@given(NUMELS, SIZES, st.integers(1, 500), st.sets(st.integers(1, 20)))
def test_groups_and_parts_hold_every_round_once(numels, size, group, breaks):
    cut = segment(numels, size, breaks)
    groups = list(cut.groups(group))
    assert [round_ for rounds in groups for round_ in rounds] == list(range(len(cut.numels)))
    for before, after in itertools.pairwise(groups):
        assert sum(cut.numels[r] for r in before) <= group or len(before) == 1
        assert sum(cut.numels[r] for r in before) + cut.numels[after.start] > group
    places = sorted({0, len(numels), *(place for place in breaks if place < len(numels))})
    parts = [cut.within(first, stop) for first, stop in itertools.pairwise(places)]
    assert [r for rounds in reversed(parts) for r in rounds] == list(range(len(cut.numels)))
    for first in range(len(numels)):
        nothing = cut.within(first, first)
        assert not nothing
        assert nothing.start == cut.spans[first].stop
    assert cut.within(len(numels), len(numels)) == range(0)


@settings(max_examples=300)
@given(LAYOUTS, SIZES)
def test_every_element_is_in_exactly_one_bucket_of_its_own_rounds_set_and_group(layout, size):
    numels, items, owners = layout
    cut = segment(numels, size)
    by_index = {item.parameter: item for item in items}
    seen = {item.parameter: 0 for item in items}
    for bucket in flat(cut.buckets(items, owners)):
        assert bucket.numel == sum(bucket.numels) > 0
        for index, start, numel in zip(bucket.items, bucket.starts, bucket.numels, strict=True):
            member = by_index[index]
            assert bucket.round in cut.spans[member.position[0]]
            assert (member.owner_set, member.group, member.in_place) == bucket.key[1:]
            # Ascending: who takes the last element of a parameter takes it last.
            assert start == seen[index]
            seen[index] += numel
    assert seen == {item.parameter: item.numel for item in items}


@settings(max_examples=300)
@given(LAYOUTS, SIZES)
def test_pieces_are_even_and_only_the_last_one_is_padded(layout, size):
    numels, items, owners = layout
    cut = segment(numels, size)
    by_index = {item.parameter: item for item in items}
    for pieces in cut.buckets(items, owners):
        span = cut.spans[by_index[pieces[0].items[0]].position[0]]
        share = owners[pieces[0].owner_set] * ALIGNMENT
        assert [bucket.round for bucket in pieces] == list(span)[: len(pieces)]
        assert {bucket.numel for bucket in pieces[:-1]} in (set(), {pieces[0].numel})
        assert not any(bucket.numel % share for bucket in pieces[:-1])
        assert pieces[-1].numel <= pieces[0].numel
        if len(span) > 1:
            total = sum(bucket.numel for bucket in pieces)
            assert pieces[0].numel < total / len(span) + share, "an even share, but for alignment"


@settings(max_examples=300)
@given(LAYOUTS, SIZES, st.randoms())
def test_the_order_is_total_backward_and_does_not_depend_on_the_input_order(layout, size, random):
    numels, items, owners = layout
    cut = segment(numels, size)
    buckets = cut.buckets(items, owners)
    keys = [bucket.key for bucket in flat(buckets)]
    assert keys == sorted(set(keys)), "strictly ascending: no two buckets could swap"
    for round_ in range(len(cut.numels)):
        of_round = [bucket for pieces in buckets for bucket in pieces if bucket.round == round_]
        assert of_round == flat([of_round]), "ascending within a round as they come"
    position = {item.parameter: item.position for item in items}
    for bucket in flat(buckets):
        backward = [position[i] for i in bucket.items]
        assert backward == sorted(backward, reverse=True)
    shuffled = list(items)
    random.shuffle(shuffled)
    assert cut.buckets(shuffled, owners) == buckets


@settings(max_examples=300)
@given(LAYOUTS, SIZES, st.sets(st.integers(0, SETS - 1)))
def test_what_else_a_rank_holds_changes_nothing(layout, size, owned):
    numels, items, owners = layout
    cut = segment(numels, size)
    mine = cut.buckets([item for item in items if item.owner_set in owned], owners)
    assert mine == tuple(pieces for pieces in cut.buckets(items, owners) if pieces[0].owner_set in owned)


@settings(max_examples=200)
@given(LAYOUTS, SIZES, st.lists(st.sets(st.integers(0, SETS - 1), min_size=1), min_size=2, max_size=6))
def test_launching_in_order_never_waits_in_a_circle(layout, size, holdings):
    """Ranks that hold different owner sets and block on each bucket until all of its owners are at it."""
    numels, items, owners = layout
    cut = segment(numels, max(size, max(numels) // 4))
    queues = [flat(cut.buckets([i for i in items if i.owner_set in owned], owners)) for owned in holdings]
    while any(queues):
        heads = {queue[0].key for queue in queues if queue}
        free = [key for key in heads if all(not q or key == q[0].key or key not in {b.key for b in q} for q in queues)]
        assert free, "deadlock"
        for queue in queues:
            if queue and queue[0].key == free[0]:
                queue.pop(0)


@pytest.mark.parametrize(
    ("size", "breaks", "expected"),
    [
        (20, (), [(1, 2), (0, 1), (0, 1)]),
        (10, (), [(2, 3), (1, 2), (0, 1)]),
        (8, (), [(4, 6), (2, 4), (0, 2)]),
        (100, (), [(0, 1)] * 3),
        (100, (1,), [(1, 2), (0, 1), (0, 1)]),
        (100, (1, 2), [(2, 3), (1, 2), (0, 1)]),
    ],
)
def test_an_example(size, breaks, expected):
    cut = segment([10, 10, 10], size, breaks)
    assert [(span.start, span.stop) for span in cut.spans] == expected


def test_an_embedding_is_cut_between_its_fragments_too():
    """Two owners hold 100 and 60 elements of it; pieces are multiples of 16."""
    cut = segment([400, 30], 100)
    items = [Item((0, 0), 1, 0, 100, 7), Item((0, 5), 1, 0, 60, 8), Item((1, 0), 1, 0, 30, 9)]
    single, pieces = cut.buckets(items, [4, 2])
    assert cut.numels == (30, 100, 100, 100, 100)
    assert single[0][4:] == ((9,), (0,), (30,))
    assert [bucket[4:] for bucket in pieces] == [
        ((8,), (0,), (48,)),
        ((8, 7), (48, 0), (12, 36)),
        ((7,), (36,), (48,)),
        ((7,), (84,), (16,)),
    ]
