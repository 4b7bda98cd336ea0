"""Ranges of elements as runs, and runs as rectangles."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.checkpoint import Run, cut, whole
from deepspeed_sdp.checkpoint.runs import common


@st.composite
def a_run(draw, rows, columns):
    column = draw(st.integers(0, columns - 1))
    width = draw(st.integers(1, columns - column))
    start = draw(st.integers(0, rows * width - 1))
    stop = draw(st.integers(start + 1, rows * width))
    return Run("x", (rows, columns), rows, column, width, start, stop)


def elements(run):
    """Places in the full tensor, in the run's order."""
    matrix = torch.arange(math.prod(run.shape)).view(run.rows, -1)
    return matrix[:, run.column : run.column + run.width].reshape(-1)[run.start : run.stop]


@settings(max_examples=300)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_what_two_runs_share_is_found_and_lies_where_it_is_said_to(rows, columns, data):
    one = data.draw(a_run(rows, columns))
    other = data.draw(st.one_of(a_run(rows, columns), st.just(next(cut([whole("x", (rows, columns))], 0, 10**9)))))
    here, there, shared = common(one, other)
    values, target = elements(other).clone(), torch.full((one.numel,), -1)
    for part in shared:
        here.view(target, part).copy_(there.view(values, part))
    assert not (one.is_apart(other) and shared)
    expected = elements(one)
    in_both = torch.isin(expected, values)
    assert torch.equal(target[in_both], expected[in_both])
    assert (target[~in_both] == -1).all()


@settings(max_examples=200)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_a_range_of_runs_that_lie_one_after_the_other(rows, columns, data):
    runs = data.draw(st.lists(a_run(rows, columns), min_size=1, max_size=4))
    flat = torch.cat([elements(run) for run in runs])
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    found = [elements(run) for run in cut(runs, start, stop)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=flat.dtype), *found]), flat[start:stop])
