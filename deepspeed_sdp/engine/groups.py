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

    Attributes:
        for_gradients, for_weights: two more groups of the whole world.
    """

    def __init__(self, plan: SubnetworkPlan, workers: Sequence[int]) -> None:
        self.rank = dist.get_rank()
        self.workers = tuple(workers)
        self.subnetwork_index = self.workers[self.rank]
        self._ranks = [
            tuple(rank for rank, worker in enumerate(self.workers) if worker in owners) for owners in plan.owner_sets
        ]
        self._created: list[ProcessGroup] = []
        self._for_checkpoints: ProcessGroup | None = None
        self._groups = [self._make(ranks) for ranks in self._ranks]
        everyone = list(range(dist.get_world_size()))
        self.for_gradients: ProcessGroup = self._keep(dist.new_group(everyone))
        self.for_weights: ProcessGroup = self._keep(dist.new_group(everyone))

    def _make(self, ranks: Sequence[int]) -> ProcessGroup:
        if len(ranks) == dist.get_world_size():
            world = dist.group.WORLD
            assert world is not None
            return world
        group: ProcessGroup = dist.new_group(list(ranks))
        return self._keep(group) if self.rank in ranks else group

    def _keep(self, group: ProcessGroup) -> ProcessGroup:
        self._created.append(group)
        return group

    def ranks(self, owner_set: int) -> tuple[int, ...]:
        """Global ranks that own what ``owner_set`` owns, ascending."""
        return self._ranks[owner_set]

    def rank_of(self, worker: int) -> int:
        """The first rank that trains subnetwork ``worker``."""
        return self.workers.index(worker)

    def next_owner(self, rank: int, ranks: Sequence[int], steps: int) -> int:
        """The rank that stands for ``rank`` at the owner ``steps`` further among those of ``ranks``, in a circle.

        All workers have as many ranks, so each rank stands for one.
        """
        workers = sorted({self.workers[r] for r in ranks})
        own = [r for r in ranks if self.workers[r] == self.workers[rank]]
        other = workers[(workers.index(self.workers[rank]) + steps) % len(workers)]
        return [r for r in ranks if self.workers[r] == other][own.index(rank)]

    def group(self, owner_set: int) -> ProcessGroup:
        """The process group of ``owner_set``; valid on its members."""
        return self._groups[owner_set]

    def for_checkpoints(self) -> ProcessGroup:
        """Collective at its first call: a gloo group of the world, which a thread beside the training may use."""
        if self._for_checkpoints is None:
            self._for_checkpoints = self._keep(dist.new_group(backend="gloo"))
        return self._for_checkpoints

    def destroy(self) -> None:
        """Free the groups that this object created."""
        for group in self._created:
            dist.destroy_process_group(group)
        self._created.clear()
        self._for_checkpoints = None
        self._groups.clear()
        self.__dict__.pop("for_gradients", None)
        self.__dict__.pop("for_weights", None)
