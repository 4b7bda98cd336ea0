"""Plans of later rounds: the same subnetworks in size, of other units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import UnitSpace, make_plan

BLOCKS = [UnitSpace(f"layers.{i}", "layer", i, 1, 100) for i in range(7)]
UNITS = [
    UnitSpace(f"layers.{i}.{kind}", kind, i, count, 10)
    for i in range(5)
    for kind, count in (("mlp", 96 + i), ("attention", 8))
]


@st.composite
def plans(draw):
    workers = draw(st.integers(2, 8))
    owners = draw(st.integers(2, workers))
    spaces = draw(st.sampled_from([BLOCKS, UNITS]))
    return make_plan(spaces, workers, owners_per_unit=owners, design="cyclic", chunk_multiple=4)


def owned(plan):
    """Units of every worker, by space (of blocks, by kind)."""
    found = {}
    for planned in plan.spaces:
        name = planned.space.name if planned.space.num_units > 1 else planned.space.kind
        for worker in range(plan.num_subnetworks):
            units = sum(chunk.stop - chunk.start for chunk in plan.owned(planned.space.name, worker))
            found[name, worker] = found.get((name, worker), 0) + units
    return found


@given(plans(), st.integers(0, 40), st.sampled_from(["rotate", "random"]))
def test_workers_own_as_much_and_no_other_groups_are_needed(plan, round_, how):
    later = plan.resampled(round_, how)
    later.validate()
    assert later.owner_sets == plan.owner_sets
    assert owned(later) == owned(plan)
    assert later.spectral_gap == pytest.approx(plan.spectral_gap)
    assert later == plan.resampled(round_, how)
    assert round_ or later == plan


@pytest.mark.parametrize("spaces", [BLOCKS, UNITS], ids=["blocks", "units"])
def test_by_turns_every_unit_comes_to_every_owner_set_of_its_space(spaces):
    plan = make_plan(spaces, 6, owners_per_unit=2, design="cyclic", chunk_multiple=1)
    first = spaces[0].name
    turns = [plan.resampled(round_).owners(first, 0) for round_ in range(7)]
    dealt = [plan.owners(space.name) for space in BLOCKS] if spaces is BLOCKS else []
    expected = dealt or [plan.owner_sets[chunk.owner_set] for chunk in plan.spaces[0].chunks]
    assert set(turns) == set(expected)
    assert len({plan.resampled(round_, "random").hash for round_ in range(12)}) > 6


def test_what_is_no_round_is_refused():
    plan = make_plan(UNITS, 4, owners_per_unit=2)
    for round_ in (-1, 1.5, True):
        with pytest.raises(PlanError, match=rf"round: got {round_}, takes a number from 0 on"):
            plan.resampled(round_)
    with pytest.raises(PlanError, match=r"resample: got 'shuffle'"):
        plan.resampled(1, "shuffle")
