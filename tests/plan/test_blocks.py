"""Whole blocks as units: balance over the layers, and no worker without several layers in a row."""

from dataclasses import replace

import pytest

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import Chunk, SubnetworkPlan, UnitSpace, make_plan


def layers(count: int) -> list[UnitSpace]:
    return [UnitSpace(f"model.layers.{i}", "layer", i, 1, 100) for i in range(count)]


def branches(count: int) -> list[UnitSpace]:
    return [
        space
        for i in range(count)
        for space in (
            UnitSpace(f"model.layers.{i}.self_attn", "attention", i, 1, 50),
            UnitSpace(f"model.layers.{i}.mlp", "mlp", i, 1, 110),
        )
    ]


def absence(plan: SubnetworkPlan, kind: str) -> int:
    """In how many blocks of a kind in a row a worker owns nothing, at most."""
    owners = [plan.owners(planned.space.name) for planned in plan.spaces if planned.space.kind == kind]
    runs = ["".join("x" if w in block else "." for block in owners) for w in range(plan.num_subnetworks)]
    return max(len(absent) for run in runs for absent in run.split("x"))


@pytest.mark.parametrize("n", range(2, 17))
def test_with_half_coverage_no_worker_loses_three_layers_in_a_row(n: int) -> None:
    for k in range(max(2, (n + 1) // 2), n + 1):
        for count in range(4, 49) if n in (3, 8) else (4, 5, 7, 23, 48):
            for spaces in (layers(count), branches(count)):
                # Two or three blocks leave some workers without a common one.
                plan = make_plan(spaces, n, owners_per_unit=k)
                for kind in {space.kind for space in spaces}:
                    assert absence(plan, kind) <= 2, (n, k, count)
                    owned = [sum(w in plan.owners(s.name) for s in spaces if s.kind == kind) for w in range(n)]
                    assert max(owned) - min(owned) <= 1
                assert len(plan.used_sets) <= 64


@pytest.mark.parametrize("design", ["auto", "cyclic", "random"])
@pytest.mark.parametrize(("n", "k", "count"), [(8, 3, 31), (9, 4, 23), (5, 2, 17), (16, 6, 40), (6, 2, 25), (7, 1, 9)])
def test_blocks_are_balanced_at_any_coverage(design: str, n: int, k: int, count: int) -> None:
    plan = make_plan(layers(count), n, owners_per_unit=k, design=design)
    owned = [sum(w in plan.owners(p.space.name) for p in plan.spaces) for w in range(n)]
    assert max(owned) - min(owned) <= 1
    assert plan.connected or k == 1


def test_owners_of_a_block_need_no_unit() -> None:
    plan = make_plan([*layers(6), UnitSpace("mlp", "mlp", 6, 64, 10)], 4, owners_per_unit=2)
    assert plan.owners("model.layers.3") == plan.owners("model.layers.3", 0)
    with pytest.raises(PlanError, match=r"unit: missing, takes 0 to 63 for 'mlp'"):
        plan.owners("mlp")


def test_unbalanced_blocks_are_refused() -> None:
    plan = make_plan(layers(6), 4, owners_per_unit=2)
    lopsided = replace(plan.spaces[0], chunks=(Chunk(0, 1, 1),))
    spaces = tuple(replace(lopsided, space=planned.space) for planned in plan.spaces[:3]) + plan.spaces[3:]
    used = sorted({chunk.owner_set for planned in spaces for chunk in planned.chunks})
    renamed = tuple(
        replace(p, chunks=tuple(Chunk(c.start, c.stop, used.index(c.owner_set) + 1) for c in p.chunks)) for p in spaces
    )
    sets = (plan.owner_sets[0], *(plan.owner_sets[i] for i in used))
    with pytest.raises(PlanError, match=r"kind 'layer': workers own from \d to \d blocks, more than one apart"):
        replace(plan, spaces=renamed, owner_sets=sets).validate()


def test_many_workers_and_few_units_stay_within_the_owner_sets() -> None:
    spaces = [
        space
        for i in range(4)
        for space in (UnitSpace(f"a{i}", "attention", i, 2, 1000), UnitSpace(f"m{i}", "mlp", i, 20, 30))
    ]
    assert len(make_plan(spaces, 61, owners_per_unit=29, seed=2).used_sets) <= 64
