"""Which rank trains which subnetwork, so that the owners of a unit lie where their traffic is cheap, or safe.

Pure. Nodes are runs of ``ranks_per_node`` consecutive ranks, as launchers number them.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.plan import SubnetworkPlan

RankOrder = Literal["auto", "round_robin", "owners_within_node", "owners_across_nodes"]


def place_workers(plan: SubnetworkPlan, world_size: int, ranks_per_node: int, order: RankOrder) -> tuple[int, ...]:
    """The subnetwork of every rank, ``[world_size]``; every subnetwork on ``world_size / N`` ranks.

    ``"auto"``: the ``R`` replicas of a worker side by side, rank ``r`` trains ``r // R``: on one node where ``R``
    divides its ranks, else on as few as can be. ``"round_robin"``: rank ``r`` trains ``r % N``.
    ``"owners_within_node"``: workers that share most sit on one node, and so do the workers of one replica.
    ``"owners_across_nodes"``: workers that share least sit on one node, so that a lost node takes few owners of any
    unit with it.

    Raises:
        PlanError: the numbers do not divide.
    """
    workers = plan.num_subnetworks
    if world_size % workers:
        raise PlanError(f"num_subnetworks: got {workers} with a world size of {world_size}; takes a divisor of it")
    if order == "auto":
        return tuple(rank // (world_size // workers) for rank in range(world_size))
    if order == "round_robin" or world_size <= ranks_per_node:
        return tuple(rank % workers for rank in range(world_size))
    if world_size % ranks_per_node:
        raise PlanError(
            f"plan.rank_order: got {order!r} with {world_size} ranks on nodes of {ranks_per_node}; takes nodes of "
            'equal size, or "round_robin"'
        )
    replicas, nodes = world_size // workers, world_size // ranks_per_node
    shared = _shared_numel(plan)
    if order == "owners_across_nodes":
        # Equal replicas side by side leave a node with the fewest different workers, those that share least.
        seats = [worker for worker in _cluster(-shared, _per_node(workers, nodes)) for _ in range(replicas)]
        return tuple(seats)
    if workers <= ranks_per_node:
        return tuple(rank % workers for rank in range(world_size))
    return tuple(_cluster(shared, ranks_per_node)) * replicas


def nodes_of_owners(plan: SubnetworkPlan, placement: tuple[int, ...], ranks_per_node: int) -> float:
    """Mean number of nodes that the owners of a parameter lie on, over the partitioned parameters."""
    total = 0.0
    for planned in plan.spaces:
        for chunk in planned.chunks:
            owners = plan.owner_sets[chunk.owner_set]
            nodes = {rank // ranks_per_node for rank, worker in enumerate(placement) if worker in owners}
            total += len(nodes) * (chunk.stop - chunk.start) * planned.space.unit_numel
    return total / plan.total_numel


def _per_node(workers: int, nodes: int) -> int:
    return max(1, -(-workers // nodes))


def _shared_numel(plan: SubnetworkPlan) -> npt.NDArray[np.float64]:
    """Parameters that two workers own both, ``[N, N]``."""
    shared = np.zeros((plan.num_subnetworks, plan.num_subnetworks))
    for planned in plan.spaces:
        for chunk in planned.chunks:
            owners = list(plan.owner_sets[chunk.owner_set])
            shared[np.ix_(owners, owners)] += (chunk.stop - chunk.start) * planned.space.unit_numel
    return shared


def _cluster(affinity: npt.NDArray[np.float64], size: int) -> list[int]:
    """All workers, those with most affinity in one run of ``size``: greedy, then swaps while they help."""
    left = list(range(len(affinity)))
    order: list[int] = []
    while left:
        cluster = [left.pop(0)]
        while left and len(cluster) < size:
            best = max(left, key=lambda w: (affinity[w, cluster].sum(), -w))
            left.remove(best)
            cluster.append(best)
        order += cluster
    return _improve(order, affinity, size)


def _improve(order: list[int], affinity: npt.NDArray[np.float64], size: int) -> list[int]:
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            for j in range(i + 1, len(order)):
                if i // size != j // size and _gain(order, i, j, affinity, size) > 0.5:
                    order[i], order[j] = order[j], order[i]
                    improved = True
    return order


def _gain(order: list[int], i: int, j: int, affinity: npt.NDArray[np.float64], size: int) -> float:
    def tie(position: int, worker: int, without: int) -> float:
        start = position // size * size
        mates = [w for w in order[start : start + size] if w not in (worker, without)]
        return float(affinity[worker, mates].sum())

    a, b = order[i], order[j]
    return tie(j, a, b) + tie(i, b, a) - tie(i, a, b) - tie(j, b, a)
