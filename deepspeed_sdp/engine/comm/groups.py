"""One process group per owner set."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed_sdp.errors import StateError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.ranks import cpu_group, new_group
from deepspeed_sdp.waits import waiting


class Group:
    """A process group that ends with its engine. Whoever uses one holds this, and never the group itself.

    To torch ``None`` is the default group: there is no state of this object in which it would stand for that.

    Attributes:
        ranks: global ranks of its members, ascending.
    """

    def __init__(self, process_group: ProcessGroup, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._process_group: ProcessGroup | None = process_group if dist.get_rank() in self.ranks else None

    @property
    def handle(self) -> ProcessGroup:
        """What torch takes.

        Raises:
            StateError: its engine is destroyed, or this rank is no member.
        """
        if self._process_group is None:
            raise StateError(
                f"process group of rank(s) {', '.join(map(str, self.ranks))}: this rank is not in it, or its engine is "
                "destroyed"
            )
        return self._process_group

    @property
    def backend(self) -> str:
        """Name of its backend."""
        return str(dist.get_backend(self.handle))

    @contextmanager
    def waiting(self, what: str) -> Iterator[ProcessGroup]:
        """The group, for one collective that is waited for inside; ``what`` it does, in words.

        Raises:
            WaitError: see :func:`deepspeed_sdp.waits.waiting`.
        """
        with waiting(what, self.ranks):
            yield self.handle

    def destroy(self) -> None:
        """Free it. Its threads run as long as something holds the group."""
        group, self._process_group = self._process_group, None
        if group is not None:
            # torch knows it no more where the job has destroyed the default group.
            with suppress(ValueError):
                dist.destroy_process_group(group)


class OwnerGroups:
    """The ranks and process groups of every owner set of a plan.

    Args:
        plan: the plan.
        workers: the subnetwork of every rank, ``[world size]``; so the owners of a unit are ``K * R`` ranks.

    Every rank creates every group, in the order of the plan, as ``torch.distributed.new_group`` demands.

    Attributes:
        for_gradients, for_weights: two groups of the whole world, the former also of the owner set of all workers.
            Neither is the default group, which is the user's.
    """

    def __init__(self, plan: SubnetworkPlan, workers: Sequence[int]) -> None:
        self.rank = dist.get_rank()
        self.workers = tuple(workers)
        self.subnetwork_index = self.workers[self.rank]
        self._ranks = [
            tuple(rank for rank, worker in enumerate(self.workers) if worker in owners) for owners in plan.owner_sets
        ]
        self._everyone = tuple(range(dist.get_world_size()))
        self._for_checkpoints: Group | None = None
        self.for_gradients = self._make(self._everyone, "gradients")
        self.for_weights = self._make(self._everyone, "weights")
        self._groups = [
            self.for_gradients if ranks == self._everyone else self._make(ranks, f"owners on ranks {ranks}")
            for ranks in self._ranks
        ]

    def _make(self, ranks: Sequence[int], purpose: str) -> Group:
        return Group(new_group(ranks, purpose), ranks)

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

    def group(self, owner_set: int) -> Group:
        """The process group of ``owner_set``; usable on its members."""
        return self._groups[owner_set]

    def for_checkpoints(self) -> Group:
        """Collective at its first call: a group of the world on the CPU, which a thread beside the training may use."""
        if self._for_checkpoints is None:
            self._for_checkpoints = Group(cpu_group("checkpoints"), self._everyone)
        return self._for_checkpoints

    def destroy(self) -> None:
        """Free the groups; whoever holds one cannot use it any more."""
        for group in (self.for_gradients, self.for_weights, *self._groups, self._for_checkpoints):
            if group is not None:
                group.destroy()
