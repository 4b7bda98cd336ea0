"""Who talks to whom: the replicas of one worker inside, owner sets outside.

Ranks are a table of workers and *replica coordinates*: where the world is ``N * R``, each worker has a rank at each of
``R`` coordinates. What an owner set of ``K`` workers owns is cut into ``R`` slices, one for each coordinate, and each
slice into ``K`` shards. Collectives go over the ``R`` replicas of a worker, which placement puts side by side, and over
the ``K`` owners at one coordinate, never over all ``K * R``.

Many replicas are a table themselves: *levels*, those of a few nodes first, then groups of nodes, so that no ring is
long. The digits of a coordinate say where in each level a replica stands.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from itertools import groupby

import numpy as np
import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed_sdp.errors import StateError
from deepspeed_sdp.ranks import cpu_group, new_groups
from deepspeed_sdp.waits import waiting


class Mesh:
    """The table of ranks. Pure.

    Args:
        owner_sets: workers of every owner set.
        workers: the subnetwork of every rank, ``[world size]``.
        ranks_per_node: a node is so many consecutive ranks; ``None``: there is one node.

    Raises:
        ValueError: not every worker has as many ranks, or replicas have their workers in another order.

    Attributes:
        identity: equal on two meshes with the same groups.
        levels: ranks of a ring of each level, the innermost first; their product is ``replicas``.
        replicas: ``R``.
    """

    def __init__(
        self, owner_sets: Sequence[Sequence[int]], workers: Sequence[int], ranks_per_node: int | None = None
    ) -> None:
        self.owner_sets = tuple(map(tuple, owner_sets))
        self.workers = tuple(workers)
        self.ranks_per_node = ranks_per_node
        self.identity = (self.owner_sets, self.workers, ranks_per_node)
        ascending: dict[int, list[int]] = {}
        for rank, worker in enumerate(self.workers):
            ascending.setdefault(worker, []).append(rank)
        if len({len(ranks) for ranks in ascending.values()}) > 1:
            raise ValueError(f"workers of the ranks: got {self.workers}; takes as many ranks of each")
        self.levels = _levels(list(ascending.values()), ranks_per_node or len(self.workers))
        # The first digit of a coordinate, which cuts first, is that of neighbours.
        order = np.arange(len(ascending[self.workers[0]])).reshape(self.levels[::-1]).T.ravel().tolist()
        # By worker, in the order of their first ranks; then by coordinate.
        self._ranks = {worker: [ranks[i] for i in order] for worker, ranks in ascending.items()}
        self._replica = {rank: replica for ranks in self._ranks.values() for replica, rank in enumerate(ranks)}
        self._place = {worker: place for place, worker in enumerate(self._ranks)}
        self._rails = list(zip(*self._ranks.values(), strict=True))
        self.replicas = len(self._rails)
        if any(list(rail) != sorted(rail) for rail in self._rails):
            raise ValueError(f"workers of the ranks: got {self.workers}; takes the same order in every replica")

    def replica(self, rank: int) -> int:
        """The coordinate of ``rank`` among the replicas of its worker."""
        return self._replica[rank]

    def inner(self, rank: int) -> tuple[int, ...]:
        """The ``R`` ranks that train the subnetwork of ``rank``, by coordinate."""
        return tuple(self._ranks[self.workers[rank]])

    def rail(self, replica: int) -> tuple[int, ...]:
        """The ranks of all workers at one coordinate, ascending."""
        return self._rails[replica]

    def outer(self, owner_set: int, replica: int) -> tuple[int, ...]:
        """The ranks of a set's owners at one coordinate, ascending."""
        places = sorted(self._place[worker] for worker in self.owner_sets[owner_set])
        return tuple(self._rails[replica][place] for place in places)

    def ranks(self, owner_set: int) -> tuple[int, ...]:
        """All ``K * R`` ranks that own what ``owner_set`` owns, in the order of their shards."""
        return tuple(rank for replica in range(self.replicas) for rank in self.outer(owner_set, replica))

    def data_rank(self, rank: int) -> int:
        """Where ``rank`` stands where samples are dealt: modulo ``N`` it is its worker, however many ranks that has."""
        return self.replica(rank) * len(self._ranks) + self.workers[rank]

    def place(self, worker: int) -> int:
        """Where ``worker`` stands in every rail."""
        return self._place[worker]

    def families(self) -> dict[str, list[tuple[int, ...]]]:
        """All process groups, in the order in which they are made: by purpose, disjoint ones together.

        An owner set of one worker needs none, and that of all workers has those of gradients.
        """
        everyone = tuple(range(len(self.workers)))
        if self.replicas == 1:
            families = {"gradients": [everyone], "weights": [everyone]}
        else:
            families = {"all ranks": [everyone]}
            for level, size in enumerate(self.levels):
                tables = [np.moveaxis(np.reshape(ranks, self.levels), level, -1) for ranks in self._ranks.values()]
                rings = [tuple(ring) for table in tables for ring in table.reshape(-1, size).tolist()]
                families |= {f"{purpose} inside {level}": rings for purpose in ("gradients", "weights")}
            if len(self._ranks) > 1:
                families |= {"gradients": self._rails, "weights": self._rails}
        for index, workers in enumerate(self.owner_sets):
            if 1 < len(workers) < len(self._ranks):
                families[f"owners {index}"] = [self.outer(index, replica) for replica in range(self.replicas)]
        return families

    def groups_of(self, rank: int) -> list[tuple[int, ...]]:
        """The process groups that ``rank`` is in: a communicator each."""
        return [ranks for family in self.families().values() for ranks in family if rank in ranks]


# Nodes of a first ring, if they divide that way: more make it long, and fewer leave more for single ranks of a node.
_NODES = 4
# What the launch of one more ring costs, in steps from node to node.
_LAUNCH = 5


def _levels(replicas: Sequence[Sequence[int]], ranks_per_node: int) -> tuple[int, ...]:
    """How the replicas of a worker, ascending for each, are cut into rings: a first one over some nodes, then others.

    Those have one rank of a node each, and what is left for them goes through its network card alone; so a node is
    no ring by itself, behind which all else would have to pass a second time.
    """
    number = len(replicas[0])
    per_node = {
        len(list(of_node)) for ranks in replicas for _, of_node in groupby(ranks, key=lambda r: r // ranks_per_node)
    }
    inside = per_node.pop() if len(per_node) == 1 else number
    if number % inside:
        return (number,)
    nodes = number // inside
    if inside == 1:
        return _rings(nodes)
    first = min((n for n in range(2, 9) if nodes % n == 0), key=lambda n: abs(n - _NODES), default=nodes)
    return (inside * first, *(size for size in _rings(nodes // first) if size > 1))


@cache
def _rings(nodes: int) -> tuple[int, ...]:
    """Factors of ``nodes`` whose rings one after the other take the fewest steps and launches."""
    cut = ((size, *_rings(nodes // size)) for size in range(2, nodes // 2 + 1) if nodes % size == 0)
    # At equal cost the fewest rings, and of those the longest first.
    return min(((nodes,), *cut), key=lambda sizes: (sum(sizes) + (_LAUNCH - 1) * len(sizes), len(sizes), -sizes[0]))


class Group:
    """A process group that ends with its engine. Whoever uses one holds this, and never the group itself.

    To torch ``None`` is the default group: there is no state of this object in which it would stand for that.

    Attributes:
        ranks: global ranks of its members, ascending.
        place: of this rank, a member, among them.
    """

    def __init__(self, process_group: ProcessGroup, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.place = self.ranks.index(dist.get_rank())
        self._process_group: ProcessGroup | None = process_group

    @property
    def handle(self) -> ProcessGroup:
        """What torch takes.

        Raises:
            StateError: its engine is destroyed.
        """
        if self._process_group is None:
            raise StateError(f"process group of rank(s) {', '.join(map(str, self.ranks))}: its engine is destroyed")
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


class Owners:
    """The ranks that own what one owner set owns, as one rank sees them: all that a bucket knows of the mesh.

    Args:
        ranks: in the order of their shards.
        rank: this one, which may own nothing.
        replicas: ``R``.
        replica: its coordinate.

    Attributes:
        inner: the replicas of its worker, level by level; nothing where it has one alone, or is no owner.
        outer: the owners at its coordinate; ``None`` where there is one alone, or it is none of them.
        levels: all of them, the innermost first. Whoever is cut goes through them in this order, whoever is gathered
            in the other.
        sharers: who average gradients and share the optimizer's state; all owners, or see :meth:`apart`.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        replicas: int = 1,
        replica: int = 0,
        inner: Sequence[Group] = (),
        outer: Group | None = None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.replicas, self.replica = replicas, replica
        self.inner, self.outer = tuple(inner), outer
        self.levels = self.inner if outer is None else (*self.inner, outer)
        self.sharers = self

    @cached_property
    def _index(self) -> dict[int, int]:
        return {rank: index for index, rank in enumerate(self.ranks)}

    def __contains__(self, rank: int) -> bool:
        return rank in self._index

    def index(self, rank: int) -> int:
        """Which shard is that of owner ``rank``."""
        return self._index[rank]

    def next_owner(self, rank: int, steps: int) -> int:
        """The rank that stands for owner ``rank`` at the worker ``steps`` further, in a circle of all that own this."""
        workers = len(self.ranks) // self.replicas
        replica, place = divmod(self._index[rank], workers)
        return self.ranks[replica * workers + (place + steps) % workers]

    def apart(self) -> "Owners":
        """The same owners, of which each worker trains for itself (local steps): only replicas share."""
        if self.rank not in self:
            return self
        workers, made = len(self.ranks) // self.replicas, copy.copy(self)
        own = self.ranks[self._index[self.rank] % workers :: workers]
        made.sharers = Owners(own, self.rank, self.replicas, self.replica, self.inner)
        return made

    @cached_property
    def peers(self) -> tuple[int, ...]:
        """The owners at this rank's coordinate, in the order of their shards, this rank too if it is one."""
        workers = len(self.ranks) // self.replicas
        return self.ranks[self.replica * workers : (self.replica + 1) * workers]


class OwnerGroups(Mesh):
    """The mesh's process groups. Collective: every rank makes all of them.

    Attributes:
        rank, subnetwork_index: this one, and what it trains.
        world: of all ranks. None of these groups is the default group, which is the user's.
        for_gradients, for_weights: the owners of what all workers own; two, so that one waits for nothing of the other.
    """

    def __init__(
        self, owner_sets: Sequence[Sequence[int]], workers: Sequence[int], ranks_per_node: int | None = None
    ) -> None:
        super().__init__(owner_sets, workers, ranks_per_node)
        self.rank = dist.get_rank()
        self.subnetwork_index = self.workers[self.rank]
        self._groups = {purpose: _make(family, purpose) for purpose, family in self.families().items()}
        world = self._groups.get("all ranks") or self._groups["gradients"]
        assert world is not None
        self.world = world
        everyone = [rank for rail in self._rails for rank in rail]
        self.for_gradients, self.for_weights = (self._owners(everyone, p, p) for p in ("gradients", "weights"))
        self._sets = [
            self.for_gradients
            if len(workers) == len(self._ranks)
            else self._owners(self.ranks(index), "gradients", f"owners {index}")
            for index, workers in enumerate(self.owner_sets)
        ]
        self._for_checkpoints: Group | None = None

    def _owners(self, ranks: Sequence[int], family: str, outer: str) -> Owners:
        replicas, replica = self.replicas, self.replica(self.rank)
        if self.rank not in ranks:
            return Owners(ranks, self.rank, replicas, replica)
        levels = (self._groups.get(f"{family} inside {level}") for level in range(len(self.levels)))
        inner = [group for group in levels if group is not None]
        # At R = 1 there is a group of all ranks even if there is only one.
        found = self._groups.get(outer) if len(ranks) > replicas else None
        return Owners(ranks, self.rank, replicas, replica, inner, found)

    def owners(self, owner_set: int) -> Owners:
        """Who owns what ``owner_set`` owns."""
        return self._sets[owner_set]

    def for_checkpoints(self) -> Group:
        """Collective at its first call: a group of the world on the CPU, which a thread beside the training may use."""
        if self._for_checkpoints is None:
            self._for_checkpoints = Group(cpu_group("checkpoints"), range(len(self.workers)))
        return self._for_checkpoints

    def destroy(self) -> None:
        """Free the groups; whoever holds one cannot use it any more."""
        for group in (*self._groups.values(), self._for_checkpoints):
            if group is not None:
                group.destroy()


def _make(family: Sequence[tuple[int, ...]], purpose: str) -> Group | None:
    """Collective. The group of this rank among disjoint ones, if it is in any."""
    group = new_groups(family, purpose)
    own = next((ranks for ranks in family if dist.get_rank() in ranks), None)
    return None if own is None or group is None else Group(group, own)
