"""The table of ranks: replicas inside, owner sets outside."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.engine.comm.mesh import Mesh, Owners
from deepspeed_sdp.plan import UnitSpace, make_plan


def plan_of(workers, owners, layers=12):
    spaces = [UnitSpace(f"layers.{i}.mlp", "mlp", i, 4096, 100) for i in range(layers)]
    return make_plan(spaces, workers, owners_per_unit=owners)


def side_by_side(workers, replicas):
    return [rank // replicas for rank in range(workers * replicas)]


@st.composite
def meshes(draw):
    workers, replicas = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 4, 5, 16, 24, 32]))
    sets = draw(st.lists(st.sets(st.integers(0, workers - 1), min_size=1), min_size=1, max_size=6))
    placement = draw(
        st.sampled_from(
            [side_by_side(workers, replicas), [rank % workers for rank in range(workers * replicas)]],
        )
    )
    return Mesh([range(workers), *map(sorted, sets)], placement, draw(st.sampled_from([None, 1, 2, 3, 4, 8])))


@given(meshes())
def test_every_rank_lies_in_one_group_of_each_family(mesh):
    world = range(len(mesh.workers))
    for rank in world:
        assert rank in mesh.inner(rank)
        assert {mesh.workers[other] for other in mesh.inner(rank)} == {mesh.workers[rank]}
        assert (
            mesh.inner(rank)[mesh.replica(rank)]
            == rank
            == mesh.rail(mesh.replica(rank))[mesh.place(mesh.workers[rank])]
        )
    for index, owners in enumerate(mesh.owner_sets):
        ranks = mesh.ranks(index)
        assert sorted(ranks) == [rank for rank in world if mesh.workers[rank] in owners]
        for replica in range(mesh.replicas):
            outer = mesh.outer(index, replica)
            assert list(outer) == sorted(outer) == list(ranks[replica * len(owners) : (replica + 1) * len(owners)])
            assert all(mesh.replica(rank) == replica for rank in outer)
    for level, size in enumerate(mesh.levels if mesh.replicas > 1 else ()):
        for purpose in ("gradients", "weights"):
            for ring in mesh.families()[f"{purpose} inside {level}"]:
                digits = [np.unravel_index(mesh.replica(rank), mesh.levels) for rank in ring]
                assert [of_rank[level] for of_rank in digits] == list(range(size))
                assert len({(*of_rank[:level], *of_rank[level + 1 :]) for of_rank in digits}) == 1
                assert list(ring) == sorted(ring)
    for family in mesh.families().values():
        members = [rank for ranks in family for rank in ranks]
        assert len(members) == len(set(members))
        assert all(len(ranks) > 1 for ranks in family) or len(mesh.workers) == 1


@pytest.mark.parametrize(
    ("workers", "replicas", "ranks_per_node", "levels"),
    [
        (8, 1, 8, (1,)), (8, 8, 8, (8,)), (4, 2, 4, (2,)), (8, 2, 1, (2,)), (1, 4, 2, (4,)), (8, 16, 16, (16,)),
        (8, 64, 8, (32, 2)), (8, 512, 8, (32, 4, 4)), (8, 64, 1, (8, 8)), (2, 96, 4, (16, 6)), (2, 40, 4, (20, 2)),
        (8, 56, 8, (56,)), (8, 88, 8, (88,)), (8, 67, 1, (67,)), (8, 12, 8, (12,)),
    ],
)  # fmt: skip
def test_no_ring_of_replicas_is_long(workers, replicas, ranks_per_node, levels):
    mesh = Mesh([range(workers)], side_by_side(workers, replicas), ranks_per_node)
    assert mesh.levels == levels
    if len(levels) > 1 and ranks_per_node > 1:
        first, then = (mesh.families()[f"gradients inside {level}"][-1] for level in (0, 1))
        assert sorted(first) == list(range(first[0], first[0] + levels[0])), "whole nodes"
        assert len({rank // ranks_per_node for rank in then}) == levels[1]


def test_replicas_that_lie_apart_are_cut_too():
    assert Mesh([range(4)], [rank % 4 for rank in range(64)], 8).levels == (8, 2)
    assert Mesh([range(8)], [rank % 8 for rank in range(512)], 8).levels == (8, 8)


@given(meshes())
def test_a_worker_is_dealt_the_same_samples_whatever_its_replicas(mesh):
    workers = len(set(mesh.workers))
    places = [mesh.data_rank(rank) for rank in range(len(mesh.workers))]
    assert sorted(places) == list(range(len(mesh.workers)))
    assert [place % workers for place in places] == list(mesh.workers)


@given(meshes(), st.data())
def test_a_copy_goes_in_a_circle_of_the_owners_at_one_coordinate(mesh, data):
    index = data.draw(st.integers(0, len(mesh.owner_sets) - 1))
    owners, workers = Owners(mesh.ranks(index), 0, mesh.replicas, 0), mesh.owner_sets[index]
    for rank in owners.ranks:
        circle = [owners.next_owner(rank, steps) for steps in range(len(workers))]
        assert circle[0] == rank == owners.next_owner(circle[-1], 1)
        assert {mesh.workers[other] for other in circle} == set(workers)
        assert {mesh.replica(other) for other in circle} == {mesh.replica(rank)}


def test_one_replica_has_a_group_of_its_owners_for_each_set():
    plan = plan_of(8, 4)
    mesh = Mesh(plan.owner_sets, range(8))
    expected = [owners for owners in plan.owner_sets if 3 in owners and len(owners) < 8]
    assert mesh.groups_of(3) == [tuple(range(8)), tuple(range(8)), *expected]
    alone = Mesh(plan_of(8, 1).owner_sets, range(8))
    assert alone.groups_of(3) == [tuple(range(8)), tuple(range(8))], "who owns alone needs no group"


@pytest.mark.parametrize(("workers", "owners", "replicas"), [(8, 4, 1), (8, 4, 64), (64, 32, 64), (512, 256, 8)])
def test_a_rank_is_in_few_groups_whatever_the_replicas(workers, owners, replicas):
    sets = [range(workers), *([(n * 7 + w) % workers for w in range(owners)] for n in range(16))]
    began = time.perf_counter()
    mesh = Mesh(sets, side_by_side(workers, replicas), 8)
    groups = mesh.groups_of(workers * replicas // 2)
    assert time.perf_counter() - began < 5.0
    assert len(groups) <= 7 + 16
    assert all(len(ranks) <= max(workers, replicas) for ranks in groups[1:])


def test_workers_in_another_order_in_a_replica_are_refused():
    with pytest.raises(ValueError, match="takes the same order in every replica"):
        Mesh([range(2)], [0, 1, 1, 0])
    with pytest.raises(ValueError, match="takes as many ranks of each"):
        Mesh([range(2)], [0, 1, 1])
