"""One process group per owner set."""

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed_sdp.plan import SubnetworkPlan


class OwnerGroups:
    """The ranks and process groups of every owner set of a plan.

    Args:
        plan: the plan.
        workers: the subnetwork of every rank, ``[world size]``; so the owners of a unit are ``K * R`` ranks.

    Every rank creates every group, in the order of the plan, as ``torch.distributed.new_group`` demands.
    """

    def __init__(self, plan: SubnetworkPlan, workers: Sequence[int]) -> None:
        self.rank = dist.get_rank()
        self.workers = tuple(workers)
        self.subnetwork_index = self.workers[self.rank]
        self._ranks = [
            tuple(rank for rank, worker in enumerate(self.workers) if worker in owners) for owners in plan.owner_sets
        ]
        self._created: list[ProcessGroup] = []
        self._groups = [self._make(ranks) for ranks in self._ranks]
        self._own = self._make((self.rank,), local=True)

    def _make(self, ranks: Sequence[int], local: bool = False) -> ProcessGroup:
        if len(ranks) == dist.get_world_size():
            world = dist.group.WORLD
            assert world is not None
            return world
        group: ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=local)
        if self.rank in ranks:
            self._created.append(group)
        return group

    @property
    def own(self) -> ProcessGroup:
        """A group of this rank alone."""
        return self._own

    def ranks(self, owner_set: int) -> tuple[int, ...]:
        """Global ranks that own what ``owner_set`` owns, ascending."""
        return self._ranks[owner_set]

    def rank_of(self, worker: int) -> int:
        """The first rank that trains subnetwork ``worker``."""
        return self.workers.index(worker)

    def group(self, owner_set: int) -> ProcessGroup:
        """The process group of ``owner_set``; valid on its members."""
        return self._groups[owner_set]

    def destroy(self) -> None:
        """Free the groups that this object created."""
        for group in self._created:
            dist.destroy_process_group(group)
        self._created.clear()
