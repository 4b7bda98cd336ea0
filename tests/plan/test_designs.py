"""Designs: the table of gaps, the shape of classes, the bound on owner sets."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import Design, make_design, make_plan
from deepspeed_sdp.plan.table import llama_spaces


def gap(design: Design, num_classes: int | None = None) -> float:
    """1 - λ₂(W) by the definition, one unit per owner set, over the first classes."""
    n = design.num_subnetworks
    mixing = np.zeros((n, n))
    for parallel_class in design.classes[:num_classes]:
        for w in range(n):
            mine = [owners for owners in parallel_class if w in owners]
            for owners in mine:
                for v in owners:
                    mixing[w, v] += 1 / len(mine) / len(owners)
    eigenvalues = np.sort(np.linalg.eigvals(mixing / len(design.classes[:num_classes])).real)
    return float(1 - eigenvalues[-2])


def bound(n: int, k: int) -> float:
    return 1 - (n - k) / (k * (n - 1))


@pytest.mark.parametrize(
    ("name", "n", "k", "owner_sets", "expected"),
    [
        ("cyclic", 8, 4, 8, 0.573),
        ("auto", 8, 4, 14, 0.857),
        ("cyclic", 8, 2, 8, 0.146),
        ("auto", 8, 2, 28, 0.571),
        ("cyclic", 8, 6, 8, 0.905),
        ("auto", 8, 6, 28, 0.952),
        ("auto", 4, 2, 6, 2 / 3),
        ("auto", 9, 3, 12, 0.75),
        ("auto", 3, 2, 3, 0.75),
        ("auto", 7, 3, 7, 7 / 9),
        ("auto", 11, 5, 11, 0.88),
        ("auto", 8, 1, 8, 0.0),
    ],
)
def test_table_of_gaps(name: str, n: int, k: int, owner_sets: int, expected: float) -> None:
    design = make_design(name, n, k)
    assert len(design.owner_sets) == owner_sets
    assert gap(design) == pytest.approx(expected, abs=5e-4)
    assert design.spectral_gap == pytest.approx(gap(design), abs=1e-9)


@pytest.mark.parametrize(
    ("n", "k"), [(4, 2), (6, 2), (10, 2), (8, 4), (16, 4), (16, 8), (9, 3), (25, 5), (27, 9), (6, 3), (12, 6), (20, 10)]
)
def test_resolvable_designs_that_reach_the_bound(n: int, k: int) -> None:
    design = make_design("auto", n, k)
    assert design.name == "resolvable"
    assert gap(design) == pytest.approx(bound(n, k), abs=1e-6)


# What the search finds; a little below, so that a better search does not break it and a worse one does.
@pytest.mark.parametrize(
    ("n", "k", "at_least"), [(12, 3, 0.66), (12, 4, 0.77), (10, 5, 0.86), (15, 5, 0.80), (16, 2, 0.35), (32, 8, 0.83)]
)
def test_searched_and_shortened_designs(n: int, k: int, at_least: float) -> None:
    design = make_design("auto", n, k)
    assert design.name == "resolvable"
    assert len(design.owner_sets) <= 64
    assert at_least <= gap(design) <= bound(n, k) + 1e-9


@pytest.mark.parametrize(("n", "max_owner_sets"), [(4, 4), (8, 16), (8, 27), (12, 64), (14, 64), (16, 64), (18, 81)])
def test_pairs_of_the_halves_where_not_all_pairs_fit(n: int, max_owner_sets: int) -> None:
    design = make_design("auto", n, 2, max_owner_sets=max_owner_sets)
    assert len(design.owner_sets) == n * n // 4
    assert gap(design) == pytest.approx(1 / 2)


@settings(max_examples=60)
@given(st.data())
def test_two_workers_that_share_nothing_limit_the_gap(data: st.DataObject) -> None:
    """For any weights of the owner sets that load the workers equally, found by scaling weights up and down."""
    n, k = data.draw(st.integers(5, 9)), 2
    pairs = [pair for pair in combinations(range(n), k) if pair != (0, 1)]
    weights = data.draw(st.lists(st.floats(0.05, 1.0), min_size=len(pairs), max_size=len(pairs)))
    shared = np.zeros((n, n))
    for (v, w), weight in zip(pairs, weights, strict=True):
        shared[v, w] = shared[w, v] = weight
    for _ in range(2000):
        scale = 1 / np.sqrt(shared.sum(axis=1))
        shared *= scale[:, None] * scale[None, :]
    np.testing.assert_allclose(shared.sum(axis=1), 1, atol=1e-6)
    eigenvalues = np.linalg.eigvalsh((np.eye(n) + shared) / k)
    assert 1 - eigenvalues[-2] <= 1 / 2 + 1e-6


def test_random_halves_mix_worse_than_planes() -> None:
    gaps = [gap(make_design("random", 8, 4, seed=seed), 24) for seed in range(20)]
    assert np.mean(gaps) == pytest.approx(0.73, abs=0.03)


def is_partition(parallel_class: tuple[tuple[int, ...], ...], n: int) -> bool:
    return sorted(w for owners in parallel_class for w in owners) == list(range(n))


@st.composite
def workers_and_owners(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 20))
    return n, draw(st.integers(1, n))


@settings(max_examples=150)
@given(workers_and_owners(), st.sampled_from(["auto", "cyclic", "random"]), st.integers(0, 5))
def test_classes_are_balanced(size: tuple[int, int], name: str, seed: int) -> None:
    n, k = size
    design = make_design(name, n, k, seed=seed)
    assert design == make_design(name, n, k, seed=seed)
    assert 1 <= len(design.owner_sets) <= 64
    for parallel_class in design.classes:
        per_worker = [sum(w in owners for owners in parallel_class) for w in range(n)]
        assert min(per_worker) == max(per_worker) >= 1
        assert all(len(owners) == k and list(owners) == sorted(set(owners)) for owners in parallel_class)
    assert (design.name == "dense") == (n == k)
    if n == k:
        assert design.classes == ((tuple(range(n)),),)
    elif n % k == 0 and name != "cyclic":
        assert all(is_partition(c, n) for c in design.classes)
    if k > 1:
        assert gap(design) > 1e-6


@pytest.mark.parametrize(("n", "k"), [(8, 4), (8, 2), (16, 4), (16, 8), (9, 3), (12, 6), (12, 3), (32, 4)])
def test_two_classes_already_connect_the_workers(n: int, k: int) -> None:
    design = make_design("auto", n, k)
    assert gap(design, 1) == pytest.approx(0, abs=1e-9)
    assert gap(design, 2) > 1e-3 or n > k * k
    gaps = [gap(design, i) for i in range(1, len(design.classes) + 1)]
    assert gaps[-1] == pytest.approx(max(gaps), abs=1e-6)
    assert gaps[len(gaps) // 2] > 0.5 * gaps[-1]


def test_windows_are_consecutive() -> None:
    assert make_design("cyclic", 5, 2).classes == (((0, 1), (1, 2), (2, 3), (3, 4), (0, 4)),)
    assert len(make_design("cyclic", 8, 4).classes) == 1
    # gcd(8, 6) = 2: two classes of four windows, so that a worker holds three chunks of a space and not six.
    assert [len(c) for c in make_design("cyclic", 8, 6).classes] == [4, 4]


def test_seed_changes_random_and_searched_designs() -> None:
    assert make_design("random", 8, 4, seed=0) != make_design("random", 8, 4, seed=1)
    assert make_design("auto", 20, 4, seed=0) != make_design("auto", 20, 4, seed=1)


@pytest.mark.parametrize("limit", [4, 6, 13, 14, 40])
def test_max_owner_sets_is_kept(limit: int) -> None:
    design = make_design("auto", 8, 4, max_owner_sets=limit)
    assert len(design.owner_sets) <= limit
    assert gap(design) > 0.4


@pytest.mark.parametrize(
    ("name", "n", "k", "smallest"),
    [
        ("auto", 8, 4, 4),
        ("auto", 6, 3, 4),
        ("auto", 8, 1, 8),
        ("auto", 8, 5, 8),
        ("cyclic", 8, 4, 8),
        ("random", 32, 4, 16),
        ("auto", 64, 2, 64),
    ],
)
def test_smallest_max_owner_sets_is_told_and_works(name: str, n: int, k: int, smallest: int) -> None:
    with pytest.raises(PlanError, match=rf"max_owner_sets: got {smallest - 1}, takes {smallest} or more"):
        make_design(name, n, k, max_owner_sets=smallest - 1)
    design = make_design(name, n, k, max_owner_sets=smallest)
    assert len(design.owner_sets) <= smallest
    assert k == 1 or gap(design) > 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spiral", 4, 2), r"design: got 'spiral', takes one of 'auto', 'cyclic', 'random'"),
        (("auto", 0, 1), r"num_subnetworks: got 0, takes an integer of 1 or more"),
        (("auto", 4, 0), r"owners_per_unit: got 0, takes an integer of 1 or more"),
        (("auto", 4, 5), r"owners_per_unit: got 5, takes 1 to num_subnetworks \(4\)"),
        (("auto", 4, True), r"owners_per_unit: got True"),
    ],
)
def test_impossible_sizes_are_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_design(*arguments)


@pytest.mark.parametrize("heads", [1, 4, 8, 32])
@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(2, 9) for k in range(1, n)])
def test_sixteen_owner_sets_are_enough_for_up_to_8_workers(n: int, k: int, heads: int) -> None:
    plan = make_plan(llama_spaces(32, 2048, heads, 5632), n, owners_per_unit=k, max_owner_sets=16)
    assert len(plan.owner_sets) <= 17
    assert plan.connected or k == 1
    if n == 8 and heads == 8:
        assert plan.spectral_gap >= (0.87 if k == 2 else 0.96) * plan.spectral_gap_bound
