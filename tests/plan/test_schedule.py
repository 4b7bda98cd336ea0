"""ZeRO-3's sequence of gathers and reductions: the same on all ranks whatever hooks fire, and never too late."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.plan.schedule import Action, Schedule


class Rank:
    """Does what a schedule asks for, and sees to it that each step is possible."""

    def __init__(self, count, prefetch, is_tied):
        self.schedule = Schedule(count, prefetch, range(not is_tied, count), range(is_tied))
        self.parts = range(count)
        self.pending, self.ready = set(), set()
        self.issued = []  # what other ranks must issue too
        self.most = 0

    def run(self, steps):
        for action, part in steps:
            if action in (Action.UNSHARD, Action.REDUCE):
                self.issued.append((action, part))
            if action is Action.UNSHARD:
                assert part not in self.pending | self.ready
                self.pending.add(part)
            elif action is Action.WAIT:
                self.pending.remove(part)
                self.ready.add(part)
            elif action is Action.RESHARD:
                self.ready.remove(part)
            self.most = max(self.most, len(self.pending | self.ready))

    def forward(self, hooks, is_training=True):
        self.run(self.schedule.begin_forward())
        for part in hooks:
            self.run(self.schedule.before_forward(part))
            self.run(self.schedule.after_forward(part))
        self.run(self.schedule.end_forward(is_training))

    def backward(self, hooks):
        for part in hooks:
            self.run(self.schedule.before_backward(part))
        self.run(self.schedule.complete_backward())
        self.run(self.schedule.end_backward())
        assert not self.pending | self.ready, "something stays"


@st.composite
def models(draw):
    return draw(st.integers(3, 9)), draw(st.integers(0, 3)), draw(st.booleans())


@settings(max_examples=300)
@given(models(), st.integers(1, 2), st.data())
def test_all_ranks_issue_the_same_sequence_whatever_hooks_fire_in_whatever_order(model, backwards, data):
    ranks = [Rank(*model), Rank(*model)]
    parts = list(range(model[0]))
    for passes in range(2):
        for place, rank in enumerate(ranks):
            is_first = place == 0
            rank.forward(
                parts if is_first else data.draw(st.permutations(parts))[: data.draw(st.integers(0, len(parts)))]
            )
            for _ in range(backwards):
                some = data.draw(st.permutations(parts))[: data.draw(st.integers(0, len(parts)))]
                rank.backward(parts[:0:-1] if is_first else some)
        assert ranks[0].issued == ranks[1].issued, passes


@settings(max_examples=200)
@given(models(), st.sets(st.integers(0, 8)), st.integers(1, 2))
def test_nothing_is_used_before_it_is_waited_for(model, owned, backwards):
    """By a rank with hooks on some parts; an embedding needs nothing backwards, a tied one at any time."""
    count, _, is_tied = model
    rank = Rank(*model)
    rank.run(rank.schedule.begin_forward())
    hooks = [part for part in range(count) if part in owned]
    for part in hooks:
        rank.run(rank.schedule.before_forward(part))
        assert part in rank.ready
        rank.run(rank.schedule.after_forward(part))
    rank.run(rank.schedule.end_forward(is_training=True))
    assert not rank.pending
    for _ in range(backwards):
        for part in reversed([part for part in hooks if part or is_tied]):
            rank.run(rank.schedule.before_backward(part))
            assert part in rank.ready
            if is_tied and 0 in owned:
                rank.run(rank.schedule.before_backward(0))
                assert 0 in rank.ready
        rank.backward([])


@settings(max_examples=200)
@given(models())
def test_no_more_is_held_than_what_computes_and_what_is_ahead(model):
    count, prefetch, is_tied = model
    rank = Rank(*model)
    rank.run(rank.schedule.begin_forward())
    for part in range(count):
        rank.run(rank.schedule.before_forward(part))
        ahead = set(range(part, min(part + prefetch + 1, count)))
        ends = {p for p in (count - 2, count - 1) if p <= part}
        assert rank.pending | rank.ready == ahead | ends | set(range(is_tied))
        rank.run(rank.schedule.after_forward(part))
    rank.run(rank.schedule.end_forward(is_training=True))
    for part in range(count - 1, 0, -1):
        rank.run(rank.schedule.before_backward(part))
        assert rank.ready - set(range(is_tied)) <= {part, *range(count - 2, part + 1)}
        assert len(rank.pending) <= prefetch
    rank.backward([])


@settings(max_examples=100)
@given(models())
def test_every_part_is_gathered_once_forwards_and_reduced_once_backwards(model):
    count = model[0]
    rank = Rank(*model)
    rank.forward(range(count))
    rank.backward(range(count - 1, 0, -1))
    # The last two stay from the one to the other.
    twice = set(range(1, count - 2))
    expected = {(Action.UNSHARD, part): 1 + (part in twice) for part in range(count)}
    assert Counter(rank.issued) == {**expected, **{(Action.REDUCE, part): 1 for part in range(1, count)}}
    reduced = [part for action, part in rank.issued if action is Action.REDUCE]
    assert reduced == sorted(reduced, reverse=True)


@given(models(), st.sets(st.integers(0, 8)))
def test_an_evaluation_keeps_nothing(model, owned):
    rank = Rank(*model)
    rank.forward([part for part in range(model[0]) if part in owned], is_training=False)
    assert not rank.pending | rank.ready


def test_a_forward_pass_without_a_backward_pass_is_followed_by_another():
    rank = Rank(4, 1, False)
    rank.forward(range(4))
    assert rank.ready == {2, 3}
    rank.forward(range(4))
    rank.backward([3, 2, 1])


@pytest.mark.parametrize(
    ("prefetch", "expected"),
    [(1, "u0 u1 u2 u3 u1 r3 r2 r1"), (0, "u0 u1 u2 u3 r3 r2 u1 r1")],
)
def test_an_example(prefetch, expected):
    rank = Rank(4, prefetch, False)
    rank.forward(range(4))
    rank.backward([3, 2, 1])
    assert " ".join(f"{action.name[0].lower()}{part}" for action, part in rank.issued) == expected
