"""Which rank trains which subnetwork."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import UnitSpace, make_plan, nodes_of_owners, place_workers

ORDERS = ("auto", "round_robin", "owners_within_node", "owners_across_nodes")


def plan_of(workers, owners, design="auto", layers=12):
    spaces = [UnitSpace(f"layers.{i}.mlp", "mlp", i, 256, 100) for i in range(layers)]
    return make_plan(spaces, workers, owners_per_unit=owners, design=design, chunk_multiple=1)


@given(st.sampled_from(ORDERS), st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.data())
def test_every_subnetwork_runs_on_as_many_ranks(order, workers, replicas, data):
    world = workers * replicas
    per_node = data.draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
    placement = place_workers(plan_of(workers, 2), world, per_node, order)
    assert len(placement) == world
    assert all(placement.count(worker) == replicas for worker in range(workers))


def test_round_robin_is_rank_modulo_workers():
    assert place_workers(plan_of(4, 2), 8, 2, "round_robin") == (0, 1, 2, 3, 0, 1, 2, 3)


@pytest.mark.parametrize(("workers", "replicas", "per_node"), [(4, 2, 4), (4, 4, 8), (2, 8, 4), (8, 2, 3)])
def test_replicas_of_one_worker_lie_on_as_few_nodes_as_can_be(workers, replicas, per_node):
    placement = place_workers(plan_of(workers, 2), workers * replicas, per_node, "auto")
    for worker in range(workers):
        ranks = [rank for rank, of_rank in enumerate(placement) if of_rank == worker]
        fewest = -(-replicas // per_node)
        assert len({rank // per_node for rank in ranks}) <= fewest + (per_node % replicas and replicas % per_node != 0)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 8))
def test_one_replica_is_placed_by_rank(workers, per_node):
    assert place_workers(plan_of(workers, 2), workers, per_node, "auto") == tuple(range(workers))


def test_replicas_of_a_whole_plan_stay_on_a_node():
    plan = plan_of(4, 2)
    within = place_workers(plan, 16, 4, "owners_within_node")
    assert all(sorted(within[node * 4 : node * 4 + 4]) == [0, 1, 2, 3] for node in range(4))


@pytest.mark.parametrize(("workers", "owners"), [(8, 2), (8, 4), (16, 4)])
def test_neighbours_of_windows_sit_within_or_across_nodes_as_asked(workers, owners):
    plan = plan_of(workers, owners, "cyclic")
    nodes = {order: nodes_of_owners(plan, place_workers(plan, workers, 4, order), 4) for order in ORDERS}
    assert nodes["owners_within_node"] <= nodes["round_robin"]
    assert nodes["owners_within_node"] < nodes["owners_across_nodes"]


def test_replicas_side_by_side_spread_the_owners():
    plan = plan_of(4, 2)
    across = place_workers(plan, 16, 4, "owners_across_nodes")
    assert nodes_of_owners(plan, across, 4) == 2.0
    assert across == tuple(w for w in dict.fromkeys(across) for _ in range(4))


def test_nodes_of_unequal_size_are_refused():
    with pytest.raises(PlanError, match="got 'owners_within_node' with 8 ranks on nodes of 3"):
        place_workers(plan_of(8, 2), 8, 3, "owners_within_node")
    with pytest.raises(PlanError, match="num_subnetworks: got 4 with a world size of 6"):
        place_workers(plan_of(4, 2), 6, 3, "round_robin")
