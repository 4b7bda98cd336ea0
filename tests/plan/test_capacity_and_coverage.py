"""Workers of unequal capacity, kinds of unequal coverage, FLOPs: properties over random models."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from benchmarks.plan_tables import llama_spaces
from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import SubnetworkPlan, UnitSpace, make_plan
from deepspeed_sdp.plan.capacity import arrange, capacity_shares
from tests.support.ranks import ROOT

CAPACITIES = st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.5, 2.0])


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[UnitSpace], int, dict[str, Any]]:
    n = draw(st.integers(2, 12))
    kinds = draw(st.sampled_from([("attention", "mlp"), ("mlp",), ("layer",), ("attention",)]))
    units = {
        "attention": draw(st.sampled_from([1, 2, 4, 8])),
        "mlp": draw(st.sampled_from([5, 64, 333, 1376])),
        "layer": 1,
    }
    flops = draw(st.sampled_from([0.0, 7e4]))
    spaces = [
        UnitSpace(f"{kind}{i}", kind, i, units[kind], 20 if kind == "mlp" else 1000, 0.0 if kind == "mlp" else flops)
        for i in range(draw(st.integers(1, 10)))
        for kind in kinds
    ]
    owners = draw(st.one_of(st.integers(1, n), st.fixed_dictionaries({kind: st.integers(1, n) for kind in kinds})))
    return (
        spaces,
        n,
        {
            "owners_per_unit": owners,
            "worker_capacity": draw(st.one_of(st.none(), st.lists(CAPACITIES, min_size=n, max_size=n))),
            "seed": draw(st.integers(0, 3)),
            "shared_flops": draw(st.sampled_from([0.0, 1e6])),
            "chunk_multiple": draw(st.sampled_from([1, 64])),
        },
    )


@settings(max_examples=120)
@given(requests())
def test_guarantees(request_: tuple[list[UnitSpace], int, dict[str, Any]]) -> None:
    spaces, n, options = request_
    refusal = ""
    try:
        plan = make_plan(spaces, n, **options)
    except PlanError as error:
        refusal = str(error)
    if refusal:
        assert "share no partitioned unit" in refusal
        reject()
    numels = [0] * n
    for space, planned in zip(spaces, plan.spaces, strict=True):
        k = plan.owners_of_kind(space.kind)
        assert k == (
            options["owners_per_unit"]
            if isinstance(options["owners_per_unit"], int)
            else options["owners_per_unit"][space.kind]
        )
        owned = [0] * n
        for chunk in planned.chunks:
            owners = plan.owners(space.name, chunk.start)
            assert len(set(owners)) == k
            for w in owners:
                owned[w] += chunk.stop - chunk.start
        largest = max(chunk.stop - chunk.start for chunk in planned.chunks)
        shares = plan.shares(space.kind)
        assert sum(shares) == pytest.approx(k)
        assert max(shares) <= 1
        assert all(abs(units - s * space.num_units) <= largest + 1e-6 for units, s in zip(owned, shares, strict=True))
        numels = [a + b * space.unit_numel for a, b in zip(numels, owned, strict=True)]
    assert numels == [plan.owned_numel(w) for w in range(n)]
    assert sum(numels) == pytest.approx(plan.coverage * n * plan.total_numel)
    assert len(plan.used_sets) <= 64
    again = make_plan(spaces, n, **options)
    assert again == plan
    assert again.hash == plan.hash
    assert SubnetworkPlan.from_json(plan.to_json(indent=1)) == plan


def test_balance_of_flops_and_bytes() -> None:
    spaces = [
        UnitSpace("a", "attention", 0, 2, 100, 1200.0),
        UnitSpace("b", "mlp", 0, 4, 50),
    ]
    plan = make_plan(spaces, 2, owners_per_unit=1, chunk_multiple=1, shared_flops=100.0)
    assert [plan.owned_flops(w) for w in range(2)] == [1800.0, 1800.0]
    assert plan.flop_imbalance == plan.byte_imbalance == 0.0
    odd = make_plan(
        [UnitSpace("a", "layer", 0, 1, 10), UnitSpace("b", "layer", 1, 1, 30)], 2, owners_per_unit=1, shared_flops=60.0
    )
    assert odd.flop_imbalance == pytest.approx((180 + 60) / (120 + 60) - 1)
    assert odd.byte_imbalance == pytest.approx(0.5)


@pytest.mark.parametrize("kv_heads", [4, 8, 32])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (6, 3), (8, 3), (8, 5), (16, 6), (16, 12)])
def test_llama_shapes_are_level(n: int, k: int, kv_heads: int) -> None:
    for layers, hidden, mlp in ((22, 2048, 5632), (23, 3200, 8640), (32, 4096, 11008)):
        plan = make_plan(llama_spaces(layers, hidden, kv_heads, mlp), n, owners_per_unit=k)
        assert plan.flop_imbalance < 0.01
        assert plan.byte_imbalance < 0.01
        assert len(plan.to_json()) < 100_000


def test_kinds_of_different_coverage() -> None:
    spaces = llama_spaces(22, 2048, 8, 5632)
    plan = make_plan(spaces, 8, owners_per_unit={"mlp": 4, "attention": 6})
    assert plan.owners_per_unit == {"attention": 6, "mlp": 4}
    assert plan.design == "balanced"
    assert plan.coverage_of_kind("mlp") == 0.5
    numel = {kind: sum(s.numel for s in spaces if s.kind == kind) for kind in ("mlp", "attention")}
    mean = (0.5 * numel["mlp"] + 0.75 * numel["attention"]) / sum(numel.values())
    assert plan.coverage == pytest.approx(mean)
    assert 0.9 * plan.spectral_gap_bound < plan.spectral_gap <= plan.spectral_gap_bound + 1e-6
    assert plan.flop_imbalance < 0.005
    assert json.loads(plan.to_json())["owners_per_unit"] == {"attention": 6, "mlp": 4}
    same = make_plan(spaces, 8, owners_per_unit={"mlp": 4, "attention": 4})
    assert same.owners_per_unit == 4
    assert same == make_plan(spaces, 8, owners_per_unit=4)
    partly = make_plan(spaces, 8, owners_per_unit={"mlp": 4, "attention": 8})
    assert partly.owners("model.layers.0.self_attn", 3) == tuple(range(8))


def test_shares_by_capacity() -> None:
    assert capacity_shares((1, 1, 0.5, 0.5), 4, 2) == pytest.approx((2 / 3, 2 / 3, 1 / 3, 1 / 3))
    # What the first cannot own goes to the others.
    assert capacity_shares((10, 1, 1, 2), 4, 2) == pytest.approx((1, 0.25, 0.25, 0.5))
    assert capacity_shares((1, 2, 3), 3, 3) == (1, 1, 1)


@given(st.lists(st.floats(0.05, 1), min_size=3, max_size=12), st.randoms(use_true_random=False))
def test_arcs_cover_every_position_by_k(capacity: list[float], rng: Any) -> None:
    n = len(capacity)
    k = rng.randint(1, n - 1)
    shares = capacity_shares(tuple(capacity), n, k)
    arrangement = arrange(shares, rng.sample(range(n), n))
    assert len(arrangement.owners) <= n
    assert all(len(owners) == k for owners in arrangement.owners)
    held, start = [0.0] * n, 0.0
    for border, owners in zip(arrangement.borders, arrangement.owners, strict=True):
        for w in owners:
            held[w] += border - start
        start = border
    assert held == pytest.approx(list(shares), abs=1e-6)


def test_plan_by_capacity() -> None:
    plan = make_plan(llama_spaces(22, 2048, 8, 5632), 4, owners_per_unit=2, worker_capacity=[1, 1, 0.5, 0.5])
    assert plan.worker_capacity == (1, 1, 0.5, 0.5)
    assert plan.design == "arcs"
    flops = [plan.owned_flops(w) for w in range(4)]
    assert flops[0] / flops[2] == pytest.approx(2, rel=0.02)
    assert plan.flop_imbalance < 0.02
    assert len(plan.used_sets) <= 12
    equal = make_plan(llama_spaces(22, 2048, 8, 5632), 4, owners_per_unit=2, worker_capacity=[3, 3, 3, 3])
    assert equal.worker_capacity is None
    assert equal.design == "balanced"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_capacity": [1, 1, 1]}, r"worker_capacity: got 3 values, takes one for each of the 4 subnetworks"),
        ({"worker_capacity": [1, 1, 1, 0]}, r"worker_capacity: got 0 for worker 3, takes positive .*num_subnetworks=3"),
        ({"worker_capacity": [1, 1, -1, 1]}, r"got -1 for worker 2"),
        ({"worker_capacity": [1, 1, float("nan"), 1]}, r"got nan for worker 2"),
        ({"worker_capacity": "fast"}, r"got 'fast', takes a list of 4 positive numbers"),
        ({"worker_capacity": [1, 2, 1, 1], "max_owner_sets": 1}, r"max_owner_sets: got 1, takes 4 or more with"),
        ({"worker_capacity": [1, 2, 1, 1], "design": "cyclic"}, r"worker_capacity: works with design='auto', got"),
        ({"worker_capacity": [1, 1, 1, 1], "owners_per_unit": 5}, r"owners_per_unit: got 5, takes 1 to"),
        (
            {"owners_per_unit": {"mlp": 2}},
            r"owners_per_unit: got \['mlp'\], takes one number for each .*attention, mlp",
        ),
        ({"owners_per_unit": {"mlp": 2, "attention": 2, "x": 1}}, r"got \['attention', 'mlp', 'x'\]"),
        ({"owners_per_unit": {"mlp": 2, "attention": 9}}, r"owners_per_unit\['attention'\]: got 9, takes 1 to"),
        (
            {"owners_per_unit": {"mlp": 2, "attention": "2"}},
            r"owners_per_unit\['attention'\]: got '2', takes an integer",
        ),
        ({"shared_flops": -1}, r"shared_flops: got -1, takes a number of 0 or more"),
    ],
)
def test_bad_requests_are_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(llama_spaces(4, 512, 8, 640), 4, **{"owners_per_unit": 2, **options})


def test_hashes_are_the_same_in_another_process() -> None:
    program = (
        "from deepspeed_sdp.plan import make_plan\n"
        "from benchmarks.plan_tables import llama_spaces\n"
        "spaces = llama_spaces(6, 512, 4, 640)\n"
        "print(make_plan(spaces, 8, owners_per_unit=3).hash)\n"
        "print(make_plan(spaces, 8, owners_per_unit={'mlp': 3, 'attention': 5}).hash)\n"
        "print(make_plan(spaces, 5, owners_per_unit=2, worker_capacity=[1, 2, 1, 1, 0.3]).hash)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 3
