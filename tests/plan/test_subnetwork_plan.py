"""Plans: the guarantees over random models, the JSON form, what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import Chunk, PlannedSpace, SubnetworkPlan, UnitSpace, make_plan


def llama(layers: int, *, neurons: int = 11008, kv_heads: int = 8, hidden: int = 4096) -> list[UnitSpace]:
    spaces = []
    for layer in range(layers):
        kv_numel = hidden * 128 * 10
        spaces.append(UnitSpace(f"model.layers.{layer}.self_attn", "attention", layer, kv_heads, kv_numel))
        spaces.append(UnitSpace(f"model.layers.{layer}.mlp", "mlp", layer, neurons, 3 * hidden))
    return spaces


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[UnitSpace], dict[str, Any]]:
    n = draw(st.integers(1, 12))
    k = draw(st.integers(1, n))
    layers = draw(st.integers(1, 8))
    mlp = draw(st.sampled_from([1, 2, 3, 5, 16, 37, 100, 128, 344, 688]))
    heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    options = {
        "num_subnetworks": n,
        "owners_per_unit": k,
        "design": draw(st.sampled_from(["auto", "cyclic", "random"])),
        "chunk_multiple": draw(st.sampled_from([1, 8, 48, 64])),
        "seed": draw(st.integers(0, 3)),
    }
    return llama(layers, neurons=mlp, kv_heads=heads, hidden=32), options


def plan_of(request: tuple[list[UnitSpace], dict[str, Any]]) -> SubnetworkPlan:
    """The plan; examples with a model too small to connect the workers are passed over."""
    refusal = ""
    try:
        return make_plan(request[0], **request[1])
    except PlanError as error:
        refusal = str(error)
    assert "share no partitioned unit" in refusal
    if request[1]["design"] != "random":
        assert all(space.num_units < request[1]["num_subnetworks"] for space in request[0]), "windows connect it"
    reject()


@settings(max_examples=300)
@given(requests())
def test_guarantees(request_: tuple[list[UnitSpace], dict[str, Any]]) -> None:
    plan = plan_of(request_)
    check_guarantees(plan, request_[0], request_[1]["num_subnetworks"], request_[1]["owners_per_unit"])


@pytest.mark.parametrize("design", ["auto", "cyclic", "random"])
def test_guarantees_for_all_sizes_up_to_twelve(design: str) -> None:
    spaces = llama(6, neurons=172, kv_heads=2)
    for n in range(1, 13):
        for k in range(1, n + 1):
            plan = make_plan(spaces, n, owners_per_unit=k, design=design)
            check_guarantees(plan, spaces, n, k)
            mlp = [
                sum(c.stop - c.start for p in plan.spaces[1::2] for c in plan.owned(p.space.name, w)) for w in range(n)
            ]
            # A KV head is worth hundreds of these neurons, which make up for some of it.
            assert max(mlp) <= 1.4 * 6 * 172 * k / n + 1


def check_guarantees(plan: SubnetworkPlan, spaces: list[UnitSpace], n: int, k: int) -> None:
    assert plan.owner_sets[0] == tuple(range(n))
    assert [planned.space for planned in plan.spaces] == spaces
    reached = {0}
    numel = [0] * n
    links: list[tuple[int, ...]] = []
    for space, planned in zip(spaces, plan.spaces, strict=True):
        owned = [set[int]() for _ in range(n)]
        for unit in range(space.num_units):
            owners = plan.owners(space.name, unit)
            assert len(set(owners)) == k
            links.append(owners)
            for worker in owners:
                owned[worker].add(unit)
        counts = [len(units) for units in owned]
        chunk_sizes = [chunk.stop - chunk.start for chunk in planned.chunks]
        assert min(chunk_sizes) >= 1
        assert max(counts) - min(counts) <= max(chunk_sizes)
        for worker in range(n):
            listed = [u for chunk in plan.owned(space.name, worker) for u in range(chunk.start, chunk.stop)]
            assert listed == sorted(owned[worker])
            numel[worker] += len(listed) * space.unit_numel
    assert [plan.owned_numel(worker) for worker in range(n)] == numel
    assert sum(numel) == k * plan.total_numel
    assert plan.imbalance == pytest.approx(max(numel) / (sum(numel) / n) - 1)
    for _ in range(n):
        reached |= {w for owners in set(links) if reached & set(owners) for w in owners}
    assert plan.connected == (len(reached) == n)
    assert plan.connected or k == 1
    assert {plan.owner_sets[0]} | set(links) == set(plan.owner_sets)
    assert list(plan.owner_sets[1:]) == sorted(plan.owner_sets[1:])


@settings(max_examples=150)
@given(requests())
def test_same_arguments_same_plan_and_json_round_trip(request_: tuple[list[UnitSpace], dict[str, Any]]) -> None:
    plan = plan_of(request_)
    again = make_plan(request_[0], **request_[1])
    assert again == plan
    assert again.hash == plan.hash
    assert len(plan.hash) == 64
    for indent in (None, 2):
        read = SubnetworkPlan.from_json(plan.to_json(indent=indent))
        assert read == plan
        assert read.hash == plan.hash


@settings(max_examples=60)
@given(requests())
def test_mixing_matrix_is_its_definition(request_: tuple[list[UnitSpace], dict[str, Any]]) -> None:
    plan = plan_of(request_)
    n = plan.num_subnetworks
    expected = np.zeros((n, n))
    for planned in plan.spaces:
        for unit in range(planned.space.num_units):
            owners = plan.owners(planned.space.name, unit)
            for w in owners:
                for v in owners:
                    expected[w, v] += planned.space.unit_numel / len(owners)
    owned = np.array([plan.owned_numel(w) for w in range(n)], dtype=float)
    idle = owned == 0
    expected[idle, idle] = owned[idle] = 1
    expected /= owned[:, None]
    np.testing.assert_allclose(plan.mixing_matrix(), expected, atol=1e-12)
    np.testing.assert_allclose(plan.mixing_matrix().sum(axis=1), 1, atol=1e-12)
    if n > 1:
        eigenvalues = np.sort(np.linalg.eigvals(expected).real)
        assert plan.spectral_gap == pytest.approx(1 - eigenvalues[-2], abs=1e-7)
        assert (plan.spectral_gap > 1e-9) == plan.connected


def test_llama_on_eight_workers() -> None:
    plan = make_plan(llama(28), 8, owners_per_unit=4)
    assert plan.design == "balanced"
    assert plan.coverage == 0.5
    assert len(plan.owner_sets) == 15
    assert plan.spectral_gap == pytest.approx(6 / 7, abs=1e-9)
    assert plan.spectral_gap_bound == pytest.approx(6 / 7, abs=1e-9)
    assert plan.imbalance == 0
    for planned in plan.spaces:
        for worker in range(8):
            (chunk,) = plan.owned(planned.space.name, worker)
            assert (chunk.stop - chunk.start) * 2 == planned.space.num_units
    assert plan.summary() == {
        "num_subnetworks": 8,
        "owners_per_unit": 4,
        "coverage": 0.5,
        "design": "balanced",
        "owner_sets": 14,
        "connected": True,
        "spectral_gap": plan.spectral_gap,
        "spectral_gap_bound": plan.spectral_gap_bound,
        "imbalance": 0.0,
        "flop_imbalance": 0.0,
        "byte_imbalance": 0.0,
        "num_spaces": 56,
        "plan_hash": plan.hash,
    }
    assert json.loads(json.dumps(plan.summary()))["plan_hash"] == plan.hash


@pytest.mark.parametrize(("k", "expected"), [(4, 0.573), (2, 0.146), (6, 0.905)])
def test_cyclic_plans_have_the_gap_of_the_table(k: int, expected: float) -> None:
    plan = make_plan(llama(4), 8, owners_per_unit=k, design="cyclic")
    assert plan.design == "cyclic"
    assert len(plan.owner_sets) == 9
    assert plan.spectral_gap == pytest.approx(expected, abs=5e-4)


def test_units_are_weighted_by_their_parameters() -> None:
    """A unit of 9 parameters shared by 0 and 1, two of 1 and of 9 elsewhere: not every unit counts alike."""
    pairs = ((0, 1, 2), (0, 1), (0, 2), (1, 2))
    spaces = (
        PlannedSpace(UnitSpace("a", "mlp", 0, 3, 1), (Chunk(0, 1, 1), Chunk(1, 2, 2), Chunk(2, 3, 3))),
        PlannedSpace(UnitSpace("b", "attention", 0, 3, 9), (Chunk(0, 1, 1), Chunk(1, 2, 1), Chunk(2, 3, 2))),
    )
    plan = SubnetworkPlan(3, 2, "cyclic", 0, 1, pairs, spaces)
    # Worker 0 owns 1 + 1 + 9 + 9 + 9 = 29 parameters, 19 of them with worker 1.
    assert plan.mixing_matrix()[0] == pytest.approx([14.5 / 29, 9.5 / 29, 5 / 29])


def test_all_owners_is_data_parallelism() -> None:
    plan = make_plan(llama(2), 4, owners_per_unit=4, design="cyclic")
    assert plan.design == "dense"
    assert plan.owner_sets == ((0, 1, 2, 3),)
    assert all(planned.chunks == (Chunk(0, planned.space.num_units, 0),) for planned in plan.spaces)
    assert plan.spectral_gap == pytest.approx(1)
    assert plan.summary()["owner_sets"] == 1
    assert plan.connected
    alone = make_plan(llama(2), 1, owners_per_unit=1)
    assert alone.spectral_gap == alone.spectral_gap_bound == 1.0


def test_one_owner_is_independent_subnetworks() -> None:
    plan = make_plan(llama(4), 8, owners_per_unit=1)
    assert not plan.connected
    assert plan.spectral_gap == 0
    assert plan.imbalance == 0
    assert len(plan.owner_sets) == 9


@pytest.mark.parametrize(
    ("neurons", "multiple", "aligned_to"), [(11008, 64, 64), (128, 64, 64), (100, 64, 2), (96, 48, 48), (1376, 64, 16)]
)
def test_chunk_borders_are_aligned_where_the_size_allows(neurons: int, multiple: int, aligned_to: int) -> None:
    spaces = [UnitSpace(f"mlp{i}", "mlp", i, neurons, 10) for i in range(4)]
    plan = make_plan(spaces, 4, owners_per_unit=2, chunk_multiple=multiple)
    for planned in plan.spaces:
        assert len(planned.chunks) == 2
        assert all(chunk.start % aligned_to == 0 for chunk in planned.chunks)
        sizes = [chunk.stop - chunk.start for chunk in planned.chunks]
        assert max(sizes) - min(sizes) <= 0.02 * neurons / 2


@pytest.mark.parametrize(("neurons", "largest"), [(11008, 3712), (11000, 3704), (10990, 3694)])
def test_a_small_spread_keeps_the_alignment(neurons: int, largest: int) -> None:
    plan = make_plan([UnitSpace(f"mlp{i}", "mlp", i, neurons, 3) for i in range(30)], 6, owners_per_unit=2)
    for planned in plan.spaces:
        assert [chunk.start % 64 for chunk in planned.chunks] == [0, 0, 0]
        assert sorted(chunk.stop - chunk.start for chunk in planned.chunks) == [3648, 3648, largest]
    assert plan.imbalance < 0.002


def test_an_incomplete_block_goes_round() -> None:
    """One of two teams has a neuron less in every space, and not always the same one."""
    plan = make_plan([UnitSpace(f"mlp{i}", "mlp", i, 8191, 1) for i in range(12)], 4, owners_per_unit=2)
    assert {tuple(c.stop - c.start for c in planned.chunks) for planned in plan.spaces} == {(4096, 4095)}
    owned = [plan.owned_numel(w) for w in range(4)]
    assert max(owned) - min(owned) <= 2


def test_fewer_units_than_teams_balance_over_the_layers() -> None:
    plan = make_plan(llama(28, neurons=512, kv_heads=2), 8, owners_per_unit=2)
    attention = [planned.space.name for planned in plan.spaces if planned.space.kind == "attention"]
    heads = [sum(c.stop - c.start for name in attention for c in plan.owned(name, w)) for w in range(8)]
    assert sum(heads) == 28 * 2 * 2
    assert max(heads) - min(heads) <= 1
    assert plan.imbalance < 0.02


@pytest.mark.parametrize("design", ["auto", "cyclic", "random"])
def test_spaces_of_one_unit_are_spread_over_workers_and_sets(design: str) -> None:
    """Whole blocks as units: the least loaded workers must not be the same teams over and over."""
    plan = make_plan(
        [UnitSpace(f"layer{i}", "block", i, 1, 100) for i in range(24)], 8, owners_per_unit=4, design=design
    )
    assert [plan.owned_numel(w) for w in range(8)] == [1200] * 8
    assert len(plan.owner_sets) > 8
    assert plan.spectral_gap > 0.4


def test_windows_balance_where_units_do_not_divide() -> None:
    plan = make_plan([UnitSpace(f"mlp{i}", "mlp", i, 101, 3) for i in range(16)], 8, owners_per_unit=3)
    assert plan.imbalance < 0.01


def test_attention_and_mlp_each_meet_all_classes() -> None:
    """(6, 3) has ten classes: without care attention would take the even and MLP the odd ones."""
    plan = make_plan(llama(20), 6, owners_per_unit=3)
    for kind in ("attention", "mlp"):
        used = {c.owner_set for planned in plan.spaces if planned.space.kind == kind for c in planned.chunks}
        assert len(used) == 20


def test_a_single_space_falls_back_to_windows() -> None:
    spaces = [UnitSpace("mlp", "mlp", 0, 512, 10)]
    plan = make_plan(spaces, 8, owners_per_unit=4)
    assert plan.design == "cyclic"
    assert plan.connected
    assert make_plan([*spaces, UnitSpace("b", "mlp", 1, 512, 10)], 8, owners_per_unit=4).design == "balanced"


@pytest.mark.parametrize(
    ("spaces", "options", "message"),
    [
        (llama(2), {"num_subnetworks": 0}, r"num_subnetworks: got 0, takes an integer of 1 or more"),
        (llama(2), {"num_subnetworks": 4.0}, r"num_subnetworks: got 4\.0"),
        (llama(2), {"owners_per_unit": 0}, r"owners_per_unit: got 0, takes an integer of 1 or more"),
        (llama(2), {"owners_per_unit": 5}, r"owners_per_unit: got 5, takes 1 to num_subnetworks \(4\)"),
        (llama(2), {"chunk_multiple": 0}, r"chunk_multiple: got 0, takes"),
        (llama(2), {"max_owner_sets": 3}, r"max_owner_sets: got 3, takes 4 or more"),
        (llama(2), {"seed": "x"}, r"seed: got 'x', takes an integer"),
        (llama(2), {"design": "best"}, r"design: got 'best', takes one of"),
        (llama(2), {"design": "best", "owners_per_unit": 4}, r"design: got 'best', takes one of"),
        ([], {}, r"spaces: got none"),
        (llama(1) + llama(1), {}, r"spaces: got the name 'model\.layers\.0\.self_attn' twice"),
        ([UnitSpace("m", "mlp", 0, 0, 1)], {}, r"num_units of 'm': got 0, takes an integer of 1 or more"),
        ([UnitSpace("m", "mlp", 0, 1, 0)], {}, r"unit_numel of 'm': got 0"),
        ([UnitSpace("m", "mlp", 0, 1, 1)], {}, r"num_subnetworks=4, owners_per_unit=2: .*groups.*owners_per_unit=4"),
        (
            [UnitSpace("m", "mlp", 0, 64, 1)],
            {"num_subnetworks": 8, "max_owner_sets": 8, "design": "random", "owners_per_unit": 4},
            r"random design the workers fall into groups .*more layers",
        ),
        (
            [UnitSpace("m", "mlp", 0, 64, 1)],
            {"num_subnetworks": 8, "max_owner_sets": 4, "owners_per_unit": 4},
            r"too few for a balanced design; max_owner_sets: got 4, takes 8 or more with the cyclic design",
        ),
    ],
)
def test_bad_requests_are_refused_in_words(spaces: list[UnitSpace], options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"num_subnetworks": 4, "owners_per_unit": 2, **options}
    with pytest.raises(PlanError, match=message):
        make_plan(spaces, **arguments)


def test_bad_questions_are_refused_in_words() -> None:
    plan = make_plan(llama(6), 4, owners_per_unit=2)
    with pytest.raises(
        PlanError, match=r"space_name: got 'lm_head', takes one of .*model\.layers\.0\.self_attn.*12 in"
    ):
        plan.owners("lm_head", 0)
    with pytest.raises(PlanError, match=r"unit: got 8, takes 0 to 7 for 'model\.layers\.1\.self_attn'"):
        plan.owners("model.layers.1.self_attn", 8)
    with pytest.raises(PlanError, match=r"unit: got -1"):
        plan.owners("model.layers.1.self_attn", -1)
    with pytest.raises(PlanError, match=r"worker: got 4, takes 0 to 3"):
        plan.owned("model.layers.1.self_attn", 4)
    with pytest.raises(PlanError, match=r"worker: got -1, takes 0 to 3"):
        plan.owned_numel(-1)


def small_plan() -> SubnetworkPlan:
    return make_plan(llama(3, neurons=64, kv_heads=4), 4, owners_per_unit=2)


def with_chunks(*chunks: Chunk) -> SubnetworkPlan:
    plan = small_plan()
    return replace(plan, spaces=(replace(plan.spaces[0], chunks=chunks), *plan.spaces[1:]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: with_chunks(Chunk(0, 2, 1)), r"self_attn: chunks cover 2 of 4 units"),
        (lambda: with_chunks(Chunk(0, 2, 1), Chunk(3, 4, 6)), r"chunk \[3, 4\) does not continue at unit 2"),
        (lambda: with_chunks(Chunk(0, 3, 1), Chunk(2, 4, 6)), r"chunk \[2, 4\) does not continue at unit 3"),
        (lambda: with_chunks(Chunk(0, 0, 1), Chunk(0, 4, 6)), r"chunk \[0, 0\) does not continue"),
        (lambda: with_chunks(Chunk(0, 4, 9)), r"owner set 9, there are 7"),
        (lambda: with_chunks(Chunk(0, 4, 0)), r"units \[0, 4\) have 4 owners, not owners_per_unit=2"),
        (
            lambda: with_chunks(Chunk(0, 1, 1), Chunk(1, 2, 1), Chunk(2, 3, 1), Chunk(3, 4, 6)),
            r"workers own from 1 to 3 units, further apart than one chunk \(1 units\)",
        ),
        (lambda: replace(small_plan(), spaces=small_plan().spaces[:1]), r"no chunk uses set"),
        (lambda: replace(small_plan(), spaces=()), r"spaces: got none"),
        (lambda: replace(small_plan(), spaces=small_plan().spaces * 2), r"twice"),
        (lambda: replace(small_plan(), owner_sets=small_plan().owner_sets[1:]), r"the first must hold all workers"),
        (lambda: replace(small_plan(), owner_sets=small_plan().owner_sets[::-1]), r"the first must hold all workers"),
        (lambda: replace(small_plan(), owner_sets=((0, 1, 2, 3), (1, 0))), r"got \[1, 0\], takes 2 different workers"),
        (lambda: replace(small_plan(), owner_sets=((0, 1, 2, 3), (0, 7))), r"got \[0, 7\], takes 2 different workers"),
        (lambda: replace(small_plan(), owner_sets=((0, 1, 2, 3), (1, 2), (0, 1))), r"lexicographic order"),
        (lambda: replace(small_plan(), owners_per_unit=3), r"takes 3 different workers"),
        (lambda: replace(small_plan(), owners_per_unit=9), r"owners_per_unit: got 9"),
    ],
)
def test_validate_names_the_broken_guarantee(broken: Callable[[], SubnetworkPlan], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        broken().validate()


def test_validate_checks_connection_and_number_of_owner_sets() -> None:
    halves = tuple(PlannedSpace(UnitSpace(f"m{i}", "mlp", i, 4, 1), (Chunk(0, 2, 1), Chunk(2, 4, 2))) for i in range(3))
    plan = SubnetworkPlan(4, 2, "random", 0, 1, ((0, 1, 2, 3), (0, 1), (2, 3)), halves)
    assert not plan.connected
    assert plan.spectral_gap == pytest.approx(0, abs=1e-12)
    with pytest.raises(PlanError, match=r"share no partitioned unit, \[0, 1\], \[2, 3\]"):
        plan.validate()
    small_plan().validate(max_owner_sets=6)
    with pytest.raises(PlanError, match=r"max_owner_sets: got 5, and the plan has 6"):
        small_plan().validate(max_owner_sets=5)


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(small_plan().to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not valid JSON"),
        ("[]", r"got a JSON list, takes an object"),
        ("{}", r"version: got null, takes 1"),
        (edited(lambda d: d.update(version=2)), r"version: got 2, takes 1"),
        (edited(lambda d: d.pop("seed")), r"plan seed: this key is missing"),
        (edited(lambda d: d.update(extra=1)), r"plan extra: unknown key"),
        (edited(lambda d: d.update(num_subnetworks="4")), r'plan num_subnetworks: got "4": .*integer'),
        (edited(lambda d: d.update(num_subnetworks=True)), r"plan num_subnetworks: got true: .*integer"),
        (edited(lambda d: d.update(owner_sets=[0, 1])), r"plan owner_sets\[0\]: got 0: .*list"),
        (edited(lambda d: d["spaces"][1].pop("kind")), r"plan spaces\[1\] kind: this key is missing"),
        (edited(lambda d: d["spaces"].append(3)), r"plan spaces\[6\]: got 3: "),
        (
            edited(lambda d: d["spaces"][0]["chunks"].append([1, 2])),
            r"plan spaces\[0\] chunks\[2\]: got \[1, 2\]: list should have at least 3 items",
        ),
        (edited(lambda d: d["spaces"][0]["chunks"].pop()), r"chunks cover 2 of 4 units"),
    ],
)
def test_from_json_refuses_in_words(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SubnetworkPlan.from_json(text)


def test_hash_changes_with_the_content() -> None:
    plan = small_plan()
    assert plan.hash != replace(plan, seed=1).hash
    assert plan.hash != replace(plan, spaces=plan.spaces[:-1]).hash
    assert plan.to_json() == json.dumps(json.loads(plan.to_json()), sort_keys=True, separators=(",", ":"))


def test_hash_is_the_same_in_another_process() -> None:
    program = (
        "from deepspeed_sdp.plan import UnitSpace, make_plan\n"
        "spaces = [UnitSpace(f'm{i}', 'mlp', i, 100 + i, 7) for i in range(20)]\n"
        "for n, k, design in [(8, 4, 'auto'), (12, 4, 'auto'), (8, 3, 'cyclic'), (9, 3, 'random')]:\n"
        "    print(make_plan(spaces, n, owners_per_unit=k, design=design).hash)\n"
    )
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout.split())
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 4
    spaces = [UnitSpace(f"m{i}", "mlp", i, 100 + i, 7) for i in range(20)]
    assert outputs[0][1] == make_plan(spaces, 12, owners_per_unit=4).hash


# Of a version that chose owner sets otherwise.
_OLD_PLAN = (
    '{"chunk_multiple":64,"design":"resolvable","num_subnetworks":4,"owner_sets":[[0,1,2,3],[0,1],[0,2],[0,3],[1,2],'
    '[1,3],[2,3]],"owners_per_unit":2,"seed":0,"spaces":[{"chunks":[[0,64,3],[64,128,4]],"kind":"mlp","layer":0,'
    '"name":"m0","num_units":128,"unit_numel":3},{"chunks":[[0,64,2],[64,128,5]],"kind":"mlp","layer":1,"name":"m1",'
    '"num_units":128,"unit_numel":3},{"chunks":[[0,64,1],[64,128,6]],"kind":"mlp","layer":2,"name":"m2",'
    '"num_units":128,"unit_numel":3}],"version":1}'
)


def test_a_plan_of_another_version_keeps_its_owners_and_hash() -> None:
    """Plans are compared between machines and kept in checkpoints: the form may only change with its version."""
    plan = SubnetworkPlan.from_json(_OLD_PLAN)
    assert plan.owners("m0", 0) == (0, 3)
    assert plan.hash == "f7058e8bdf0b4a78f1ca4f875992e0b2dbe03fe1bec6d7e0d8a2d8c77eb0dd39"


def test_hash_of_a_structured_plan_is_pinned() -> None:
    spaces = [UnitSpace(f"m{i}", "mlp", i, 128, 3) for i in range(3)]
    cyclic = make_plan(spaces, 4, owners_per_unit=2, design="cyclic")
    assert cyclic.hash == "ebc0ac92da41fede9d6d6265929b70eb4a209baa3deae8a12175099debd4249a"
    balanced = make_plan(spaces, 4, owners_per_unit=2)
    assert balanced.hash == "c74013c6144df5799759c5262b8a87237c642867b92382ce4d6ebbea06569348"


def test_the_plan_needs_no_torch() -> None:
    program = (
        "import sys, deepspeed_sdp.plan\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules), 'the plan imported a framework'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_plan_of_a_large_model_is_small() -> None:
    plan = make_plan(llama(32), 16, owners_per_unit=8)
    assert len(plan.to_json()) < 20_000
