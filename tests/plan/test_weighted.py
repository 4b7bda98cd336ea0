"""Weighted designs: few owner sets, some with more turns than others, and the plans that are made of them."""

from collections import Counter

import pytest

from deepspeed_sdp.plan import SubnetworkPlan, make_design, make_plan
from deepspeed_sdp.plan.mixing import spectral_gap_bound
from deepspeed_sdp.plan.table import llama_spaces

WEIGHTED = [(14, 3), (14, 4), (14, 5), (15, 4), (16, 3)]


# 15 lines of the affine plane of order 4 have five turns of seven; 32 of 48 triples of 16 workers have two.
@pytest.mark.parametrize(
    ("n", "k", "owner_sets", "turns", "of_the_bound"),
    [
        (14, 3, 63, {1: 14, 2: 21, 3: 21, 5: 7}, 0.9848),
        (14, 4, 42, {1: 14, 2: 14, 3: 14}, 0.993),
        (14, 5, 42, {1: 14, 2: 14, 3: 14}, 0.9866),
        (15, 4, 45, {1: 30, 5: 15}, 1.0),
        (16, 3, 48, {1: 16, 2: 32}, 1.0),
    ],
)
def test_weighted_designs(n: int, k: int, owner_sets: int, turns: dict[int, int], of_the_bound: float) -> None:
    design = make_design("auto", n, k)
    times = Counter(owners for parallel_class in design.classes for owners in parallel_class)
    assert design.name == "weighted"
    assert len(design.owner_sets) == len(times) == owner_sets
    assert design.spectral_gap >= of_the_bound * spectral_gap_bound(n, k) - 1e-9
    assert all(len(set(parallel_class)) == len(parallel_class) for parallel_class in design.classes)
    assert Counter(times.values()) == turns
    loads = Counter(w for owners, count in times.items() for w in owners for _ in range(count))
    assert len(set(loads.values())) == 1
    # Any seed: nothing is searched.
    assert make_design("auto", n, k, seed=1) == design


@pytest.mark.parametrize(("n", "k"), [*WEIGHTED, (13, 2)])
def test_weighted_designs_only_where_they_fit_and_are_wanted(n: int, k: int) -> None:
    weighted = make_design("auto", n, k)
    fewer = make_design("auto", n, k, max_owner_sets=len(weighted.owner_sets) - 1)
    assert fewer.name == "developed"
    assert fewer.spectral_gap < weighted.spectral_gap
    searched = make_design("auto", n, k, weighted=False)
    assert searched.name == "developed"
    assert searched.spectral_gap < weighted.spectral_gap


def test_a_searched_design_replaces_a_weighted_one_that_mixes_less() -> None:
    assert make_design("auto", 13, 2).name == "weighted"
    assert make_design("auto", 13, 2, max_owner_sets=78).spectral_gap == pytest.approx(spectral_gap_bound(13, 2))


@pytest.mark.parametrize("layers", [2, 21, 22, 32])
@pytest.mark.parametrize(("n", "k"), [*WEIGHTED, (13, 2)])
def test_plans_of_weighted_designs(n: int, k: int, layers: int) -> None:
    spaces = llama_spaces(layers, 2048, 32, 5632)
    plan = make_plan(spaces, n, owners_per_unit=k)
    assert plan.design == "weighted"
    assert plan == make_plan(spaces, n, owners_per_unit=k)
    assert SubnetworkPlan.from_json(plan.to_json()) == plan
    plan.validate(64)
    assert len(plan.owner_sets) - 1 == len(set(plan.owner_sets[1:])) <= len(make_design("auto", n, k).owner_sets)
    assert plan.flop_imbalance < 0.02
    assert plan.byte_imbalance < 0.02
    if k > 2:
        assert plan.spectral_gap >= (0.97 if layers > 2 else 0.9) * plan.spectral_gap_bound


@pytest.mark.parametrize(("n", "k"), WEIGHTED)
def test_spaces_of_few_units_keep_owner_sets_for_themselves(n: int, k: int) -> None:
    """A weighted design would leave windows to four KV heads, which mix far less than its gain."""
    plan = make_plan(llama_spaces(22, 2048, 4, 5632), n, owners_per_unit=k)
    assert plan.design == "developed"
    assert plan.spectral_gap > 0.8 * plan.spectral_gap_bound
    plan.validate(64)


def test_kinds_with_budgets_of_their_own() -> None:
    spaces = llama_spaces(22, 2048, 32, 5632)
    plan = make_plan(spaces, 16, owners_per_unit={"attention": 8, "mlp": 3}, max_owner_sets=80)
    assert plan.design == "resolvable+weighted"
    plan.validate(80)
