"""The plan: who owns which units. Pure data, the same on every rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import mixing, plan_json
from deepspeed_sdp.plan.chunks import Chunk, PlannedSpace
from deepspeed_sdp.plan.classes import OwnerSet
from deepspeed_sdp.plan.designs import check_at_least_one, check_workers
from deepspeed_sdp.plan.units import UnitSpace


@dataclass(frozen=True)
class SubnetworkPlan:
    """Who owns what, for every unit of a model.

    Attributes:
        num_subnetworks: `N`, the workers `0 … N-1`.
        owners_per_unit: `K`, the owners of every partitioned unit.
        design: `"dense"`, `"resolvable"`, `"cyclic"` or `"random"`.
        seed: the one the plan was made with.
        chunk_multiple: the alignment asked for; a space too small for it has a finer one.
        owner_sets: index 0 is always all workers, the owners of what is shared (and of everything if `K = N`). The
            others follow in lexicographic order, each used by at least one chunk.
        spaces: in the order they were given.
    """

    num_subnetworks: int
    owners_per_unit: int
    design: str
    seed: int
    chunk_multiple: int
    owner_sets: tuple[OwnerSet, ...]
    spaces: tuple[PlannedSpace, ...]

    def owners(self, space_name: str, unit: int) -> OwnerSet:
        """The workers that own one unit, ascending.

        Raises:
            PlanError: for a space the plan does not have, or a unit outside it.
        """
        planned = self._planned(space_name)
        if not 0 <= unit < planned.space.num_units:
            raise PlanError(f"unit: got {unit}, takes 0 to {planned.space.num_units - 1} for {space_name!r}")
        chunk = planned.chunks[bisect_right(planned.chunks, unit, key=lambda c: c.start) - 1]
        return self.owner_sets[chunk.owner_set]

    def owned(self, space_name: str, worker: int) -> tuple[Chunk, ...]:
        """The chunks of a space that a worker holds, ascending.

        Raises:
            PlanError: for a space or a worker the plan does not have.
        """
        self._check_worker(worker)
        return tuple(c for c in self._planned(space_name).chunks if worker in self.owner_sets[c.owner_set])

    @property
    def coverage(self) -> float:
        """`K / N`, the nominal fraction of the partitioned units that one worker holds."""
        return self.owners_per_unit / self.num_subnetworks

    @property
    def total_numel(self) -> int:
        """Parameters of all spaces, each counted once."""
        return sum(planned.space.numel for planned in self.spaces)

    def owned_numel(self, worker: int) -> int:
        """Partitioned parameters that a worker holds.

        Raises:
            PlanError: for a worker the plan does not have.
        """
        self._check_worker(worker)
        return self._owned_numels[worker]

    @property
    def imbalance(self) -> float:
        """Largest over mean `owned_numel`, minus 1: what the slowest worker has too much."""
        mean = sum(self._owned_numels) / self.num_subnetworks
        return max(self._owned_numels) / mean - 1.0

    def mixing_matrix(self) -> mixing.Matrix:
        """`[N, N]` float64, rows summing to 1: `W[w,w'] = 1/|U_w| · Σ_{u ∈ U_w ∩ U_w'} 1/|S_u|`.

        Units count by their parameters: a KV head with its query heads is thousands of times an MLP neuron, and what is
        averaged between two workers is parameters. A worker that owns nothing has the row of the identity.
        """
        return mixing.row_stochastic(self._shared_mass)

    @cached_property
    def spectral_gap(self) -> float:
        """`1 - λ₂(W)` in [0, 1]: 1 is data parallelism, 0 workers with nothing in common (arXiv 2507.09029)."""
        return mixing.spectral_gap(self._shared_mass)

    @property
    def spectral_gap_bound(self) -> float:
        """`1 - (N-K) / (K(N-1))`, which no plan beats when all workers own equally much; 1 for `N = 1`."""
        return mixing.spectral_gap_bound(self.num_subnetworks, self.owners_per_unit)

    @property
    def connected(self) -> bool:
        """Whether averaging reaches every worker from every other through partitioned units alone."""
        return len(self._components()) == 1

    def validate(self, max_owner_sets: int | None = None) -> None:
        """Checks the guarantees of a plan: form, exactly `K` owners, cover, balance, connection, number of owner sets.

        Args:
            max_owner_sets: bound on the owner sets of partitioned units; unbounded if None.

        Raises:
            PlanError: naming the first guarantee that does not hold.
        """
        check_workers(self.num_subnetworks, self.owners_per_unit)
        self._check_owner_sets()
        if not self.spaces:
            raise PlanError("spaces: got none, takes at least one unit space")
        seen: set[str] = set()
        for planned in self.spaces:
            check_space(planned.space, seen)
            self._check_cover(planned)
            self._check_balance(planned)
        unused = set(range(1, len(self.owner_sets))) - self._used_sets
        if unused:
            raise PlanError(f"owner_sets: no chunk uses set {min(unused)}, {list(self.owner_sets[min(unused)])}")
        groups = self._components()
        if 1 < self.owners_per_unit < self.num_subnetworks and len(groups) > 1:
            raise PlanError(self._describe_unconnected(groups))
        if max_owner_sets is not None and len(self._used_sets) > max_owner_sets:
            raise PlanError(f"max_owner_sets: got {max_owner_sets}, and the plan has {len(self._used_sets)} owner sets")

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON with sorted keys; without `indent` on one line without blanks, the form that is hashed."""
        return plan_json.dump(self, indent)

    @classmethod
    def from_json(cls, text: str) -> SubnetworkPlan:
        """The plan that `to_json` wrote, validated.

        Raises:
            PlanError: for malformed JSON, another format version, missing or unknown keys, and broken guarantees.
        """
        plan = cls(**plan_json.parse(text))
        plan.validate()
        return plan

    @cached_property
    def hash(self) -> str:
        """SHA-256 of `to_json()` in hex: equal on two ranks exactly if their plans are."""
        return sha256(self.to_json().encode()).hexdigest()

    def summary(self) -> dict[str, object]:
        """What to log about a plan, JSON-able. `owner_sets` counts those of partitioned units."""
        return {
            "num_subnetworks": self.num_subnetworks,
            "owners_per_unit": self.owners_per_unit,
            "coverage": self.coverage,
            "design": self.design,
            "owner_sets": len(self._used_sets),
            "connected": self.connected,
            "spectral_gap": self.spectral_gap,
            "spectral_gap_bound": self.spectral_gap_bound,
            "imbalance": self.imbalance,
            "num_spaces": len(self.spaces),
            "plan_hash": self.hash,
        }

    @cached_property
    def _by_name(self) -> dict[str, PlannedSpace]:
        return {planned.space.name: planned for planned in self.spaces}

    @cached_property
    def _used_sets(self) -> set[int]:
        return {chunk.owner_set for planned in self.spaces for chunk in planned.chunks}

    @cached_property
    def _owned_numels(self) -> tuple[int, ...]:
        numels = [0] * self.num_subnetworks
        for owners, numel in self._owned_masses():
            for worker in owners:
                numels[worker] += numel
        return tuple(numels)

    @cached_property
    def _shared_mass(self) -> mixing.Matrix:
        return mixing.shared_mass(self._owned_masses(), self.num_subnetworks)

    def _owned_masses(self) -> Iterator[tuple[OwnerSet, int]]:
        """Each owner set in use with the parameters it owns."""
        numels = dict.fromkeys(sorted(self._used_sets), 0)
        for planned in self.spaces:
            for chunk in planned.chunks:
                numels[chunk.owner_set] += (chunk.stop - chunk.start) * planned.space.unit_numel
        return ((self.owner_sets[index], numel) for index, numel in numels.items())

    def _components(self) -> list[tuple[int, ...]]:
        return mixing.components((self.owner_sets[i] for i in self._used_sets), self.num_subnetworks)

    def _planned(self, space_name: str) -> PlannedSpace:
        if space_name not in self._by_name:
            names = list(self._by_name)
            shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
            raise PlanError(f"space_name: got {space_name!r}, takes one of the plan's unit spaces: {shown}")
        return self._by_name[space_name]

    def _check_worker(self, worker: int) -> None:
        if not 0 <= worker < self.num_subnetworks:
            raise PlanError(f"worker: got {worker}, takes 0 to {self.num_subnetworks - 1}")

    def _check_owner_sets(self) -> None:
        everyone = tuple(range(self.num_subnetworks))
        if not self.owner_sets or self.owner_sets[0] != everyone:
            raise PlanError(f"owner_sets: the first must hold all workers 0 to {self.num_subnetworks - 1}")
        for owners in self.owner_sets[1:]:
            if len(owners) != self.owners_per_unit or tuple(sorted(set(owners) & set(everyone))) != owners:
                raise PlanError(
                    f"owner_sets: got {list(owners)}, takes {self.owners_per_unit} different workers in ascending order"
                )
        if any(left >= right for left, right in zip(self.owner_sets[1:], self.owner_sets[2:], strict=False)):
            raise PlanError("owner_sets: those after the first must differ and stand in lexicographic order")

    def _check_cover(self, planned: PlannedSpace) -> None:
        name, at = planned.space.name, 0
        for chunk in planned.chunks:
            if chunk.start != at or chunk.stop <= chunk.start:
                raise PlanError(f"{name}: chunk [{chunk.start}, {chunk.stop}) does not continue at unit {at}")
            if not 0 <= chunk.owner_set < len(self.owner_sets):
                raise PlanError(f"{name}: chunk of owner set {chunk.owner_set}, there are {len(self.owner_sets)}")
            if len(self.owner_sets[chunk.owner_set]) != self.owners_per_unit:
                raise PlanError(
                    f"{name}: units [{chunk.start}, {chunk.stop}) have {len(self.owner_sets[chunk.owner_set])} owners, "
                    f"not owners_per_unit={self.owners_per_unit}"
                )
            at = chunk.stop
        if at != planned.space.num_units:
            raise PlanError(f"{name}: chunks cover {at} of {planned.space.num_units} units")

    def _check_balance(self, planned: PlannedSpace) -> None:
        owned = [0] * self.num_subnetworks
        for chunk in planned.chunks:
            for worker in self.owner_sets[chunk.owner_set]:
                owned[worker] += chunk.stop - chunk.start
        chunk_size = max(chunk.stop - chunk.start for chunk in planned.chunks)
        if max(owned) - min(owned) > chunk_size:
            raise PlanError(
                f"{planned.space.name}: workers own from {min(owned)} to {max(owned)} units, further apart than "
                f"one chunk ({chunk_size} units)"
            )

    def _describe_unconnected(self, groups: list[tuple[int, ...]]) -> str:
        units = sum(planned.space.num_units for planned in self.spaces)
        shown = ", ".join(str(list(group)) for group in groups[:4]) + (", …" if len(groups) > 4 else "")
        return (
            f"num_subnetworks={self.num_subnetworks}, owners_per_unit={self.owners_per_unit}: with the {self.design} "
            f"design the workers fall into groups that share no partitioned unit, {shown}. {len(self.spaces)} unit "
            f"space(s) with {units} units are too few: partition more layers or finer units, or take a larger "
            f"owners_per_unit or owners_per_unit={self.num_subnetworks} (data parallelism)"
        )


def check_space(space: UnitSpace, seen: set[str]) -> None:
    """Raises PlanError for a unit space without units or with a name that is in `seen`; adds its name there."""
    if space.name in seen:
        raise PlanError(f"spaces: got the name {space.name!r} twice, takes different names")
    seen.add(space.name)
    check_at_least_one(f"num_units of {space.name!r}", space.num_units)
    check_at_least_one(f"unit_numel of {space.name!r}", space.unit_numel)
