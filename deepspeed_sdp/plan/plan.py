"""The plan: who owns which units. Pure data, the same on every rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.json_text import read_json_text
from deepspeed_sdp.plan import checks, form, gap
from deepspeed_sdp.plan.capacity import capacity_shares
from deepspeed_sdp.plan.resample import Resample, resampled
from deepspeed_sdp.plan.units import Chunk, OwnerSet, PlannedSpace


@dataclass(frozen=True)
class SubnetworkPlan:
    """Who owns what, for every unit of a model.

    Attributes:
        num_subnetworks: `N`, the workers `0 … N-1`.
        owners_per_unit: `K`, the owners of every partitioned unit; a dict from kind to `K` where kinds differ.
        design: `"dense"`, `"balanced"`, `"cyclic"`, `"random"` or `"arcs"` (by capacity), or another version's name;
            several joined by `+` where kinds differ.
        seed: the one the plan was made with.
        chunk_multiple: the alignment asked for; a space too small for it has a finer one.
        owner_sets: index 0 is always all workers, the owners of what is shared (and of everything if `K = N`). The
            others follow in lexicographic order, each used by at least one chunk.
        spaces: in the order they were given.
        shared_flops: training FLOPs per token that every worker computes besides its units.
        worker_capacity: relative speeds that the units were dealt out by; None if equal.
    """

    num_subnetworks: int
    owners_per_unit: int | dict[str, int]
    design: str
    seed: int
    chunk_multiple: int
    owner_sets: tuple[OwnerSet, ...]
    spaces: tuple[PlannedSpace, ...]
    shared_flops: float = 0.0
    worker_capacity: tuple[float, ...] | None = None

    def owners(self, space_name: str, unit: int | None = None) -> OwnerSet:
        """The workers that own one unit, ascending. A space of one unit (a block) needs no `unit`.

        Raises:
            PlanError: for a space the plan does not have, or a unit outside it.
        """
        planned = self._planned(space_name)
        if unit is None:
            if planned.space.num_units > 1:
                raise PlanError(f"unit: missing, takes 0 to {planned.space.num_units - 1} for {space_name!r}")
            unit = 0
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

    def owners_of_kind(self, kind: str) -> int:
        """`K` of the units of one kind.

        Raises:
            PlanError: for a kind the plan does not have.
        """
        if isinstance(self.owners_per_unit, int):
            return self.owners_per_unit
        if kind not in self.owners_per_unit:
            raise PlanError(f"kind: got {kind!r}, takes one of {', '.join(sorted(self.owners_per_unit))}")
        return self.owners_per_unit[kind]

    def coverage_of_kind(self, kind: str) -> float:
        """`K / N` of the units of one kind."""
        return self.owners_of_kind(kind) / self.num_subnetworks

    @property
    def coverage(self) -> float:
        """The fraction of the partitioned parameters that a worker holds on average: `K / N`, or the kinds' mean."""
        if isinstance(self.owners_per_unit, int):
            return self.owners_per_unit / self.num_subnetworks
        held = sum(planned.space.numel * self.owners_of_kind(planned.space.kind) for planned in self.spaces)
        return held / self.total_numel / self.num_subnetworks

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

    def owned_flops(self, worker: int) -> float:
        """Training FLOPs per token of the units that a worker owns, without what is shared.

        Raises:
            PlanError: for a worker the plan does not have.
        """
        self._check_worker(worker)
        return self._owned_flops[worker]

    @property
    def imbalance(self) -> float:
        """Largest over mean `owned_numel`, minus 1."""
        mean = sum(self._owned_numels) / self.num_subnetworks
        return max(self._owned_numels) / mean - 1.0

    @property
    def byte_imbalance(self) -> float:
        """How much more parameters a worker owns than is due to it, at most, as a fraction of that.

        Without `worker_capacity` due is the mean, and this is `imbalance`.
        """
        due = self._due(lambda planned: float(planned.space.numel))
        return max(owned / d for owned, d in zip(self._owned_numels, due, strict=True)) - 1.0

    @property
    def flop_imbalance(self) -> float:
        """How much longer than planned the slowest worker computes: FLOPs of a step, shared ones included, over what is
        due to it, minus 1. Without `worker_capacity` due is the mean of all workers.
        """
        due = self._due(lambda planned: planned.space.num_units * planned.space.unit_cost)
        shared = self.shared_flops
        return max((owned + shared) / (d + shared) for owned, d in zip(self._owned_flops, due, strict=True)) - 1.0

    def shares(self, kind: str) -> tuple[float, ...]:
        """The fraction of the units of a kind that is due to each worker: `K / N`, or by capacity."""
        return capacity_shares(self.worker_capacity, self.num_subnetworks, self.owners_of_kind(kind))

    def mixing_matrix(self) -> gap.Matrix:
        """`[N, N]` float64, rows summing to 1: `W[w,w'] = 1/|U_w| · Σ_{u ∈ U_w ∩ U_w'} 1/|S_u|`.

        Units count by their parameters: a KV head with its query heads is thousands of times an MLP neuron, and what is
        averaged between two workers is parameters. A worker that owns nothing has the row of the identity.
        """
        return gap.row_stochastic(gap.shared_mass(self._owned_masses(), self.num_subnetworks))

    @cached_property
    def spectral_gap(self) -> float:
        """`1 - λ₂(W)` in [0, 1]: 1 is data parallelism, 0 workers with nothing in common (arXiv 2507.09029)."""
        return gap.spectral_gap(self._owned_masses(), self.num_subnetworks)

    @property
    def spectral_gap_bound(self) -> float:
        """`1 - (N-K) / (K(N-1))`, which no plan beats when all workers own equally much; 1 for `N = 1`.

        `K` is `coverage · N`, which holds for kinds of different coverage too.
        """
        return gap.spectral_gap_bound(self.num_subnetworks, self.coverage * self.num_subnetworks)

    def components(self) -> list[tuple[int, ...]]:
        """The groups of workers that are linked by common partitioned units, each ascending."""
        return gap.components((self.owner_sets[i] for i in self.used_sets), self.num_subnetworks)

    @cached_property
    def used_sets(self) -> frozenset[int]:
        """Indices of the owner sets that own a chunk."""
        return frozenset(chunk.owner_set for planned in self.spaces for chunk in planned.chunks)

    @property
    def connected(self) -> bool:
        """Whether averaging reaches every worker from every other through partitioned units alone."""
        return len(self.components()) == 1

    def resampled(self, round_: int, how: Resample = "rotate") -> SubnetworkPlan:
        """The plan of a round from 0 on, in which the owner sets own other units; `"rotate"` moves chunks on by one per
        round, as FedRolex does (arXiv 2212.01548), `"random"` draws their order by `seed` and round. The same in every
        process.

        Raises:
            PlanError: for a round below 0 or another way.
        """
        if isinstance(round_, bool) or not isinstance(round_, int) or round_ < 0:
            raise PlanError(f"round: got {round_!r}, takes a number from 0 on")
        if how not in ("rotate", "random"):
            raise PlanError(f'resample: got {how!r}, takes "rotate" or "random"')
        return resampled(self, round_, how)

    def validate(self, max_owner_sets: int | None = None) -> None:
        """Checks the guarantees of a plan: form, exactly `K` owners, cover, balance, connection, number of owner sets.

        Args:
            max_owner_sets: bound on the owner sets of partitioned units; unbounded if None.

        Raises:
            PlanError: naming the first guarantee that does not hold.
        """
        checks.check(self, max_owner_sets)

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON with sorted keys; without `indent` on one line without blanks, the form that is hashed."""
        return form.dump(self, indent)

    @classmethod
    def from_json(cls, text: str) -> SubnetworkPlan:
        """The plan that `to_json` wrote, validated.

        Raises:
            PlanError: for malformed JSON, another format version, missing or unknown keys, and broken guarantees.
        """
        plan = cls(**form.parse(text))
        plan.validate()
        return plan

    @classmethod
    def read(cls, path: Path) -> SubnetworkPlan:
        """The plan in a file.

        Raises:
            PlanError: naming the file: it cannot be read, or see `from_json`.
        """
        try:
            return cls.from_json(read_json_text(path))
        except OSError as error:
            raise PlanError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise PlanError(f"{path}: {error}") from None

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
            "owner_sets": len(self.used_sets),
            "connected": self.connected,
            "spectral_gap": self.spectral_gap,
            "spectral_gap_bound": self.spectral_gap_bound,
            "imbalance": self.imbalance,
            "flop_imbalance": self.flop_imbalance,
            "byte_imbalance": self.byte_imbalance,
            "num_spaces": len(self.spaces),
            "plan_hash": self.hash,
        }

    @cached_property
    def _by_name(self) -> dict[str, PlannedSpace]:
        return {planned.space.name: planned for planned in self.spaces}

    @cached_property
    def _owned_numels(self) -> tuple[int, ...]:
        numels = [0] * self.num_subnetworks
        for owners, numel in self._owned_masses():
            for worker in owners:
                numels[worker] += numel
        return tuple(numels)

    @cached_property
    def _owned_flops(self) -> tuple[float, ...]:
        flops = [0.0] * self.num_subnetworks
        for planned in self.spaces:
            for chunk in planned.chunks:
                for worker in self.owner_sets[chunk.owner_set]:
                    flops[worker] += (chunk.stop - chunk.start) * planned.space.unit_cost
        return tuple(flops)

    def _due(self, size: Callable[[PlannedSpace], float]) -> list[float]:
        """Each worker's due of the sizes of all spaces."""
        sizes: dict[str, float] = {}
        for planned in self.spaces:
            sizes[planned.space.kind] = sizes.get(planned.space.kind, 0.0) + size(planned)
        due = [0.0] * self.num_subnetworks
        for kind, total in sizes.items():
            for worker, share in enumerate(self.shares(kind)):
                due[worker] += share * total
        return due

    def _owned_masses(self) -> Iterator[tuple[OwnerSet, int]]:
        """Each owner set in use with the parameters it owns."""
        numels = dict.fromkeys(sorted(self.used_sets), 0)
        for planned in self.spaces:
            for chunk in planned.chunks:
                numels[chunk.owner_set] += (chunk.stop - chunk.start) * planned.space.unit_numel
        return ((self.owner_sets[index], numel) for index, numel in numels.items())

    def _planned(self, space_name: str) -> PlannedSpace:
        if space_name not in self._by_name:
            names = list(self._by_name)
            shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
            raise PlanError(f"space_name: got {space_name!r}, takes one of the plan's unit spaces: {shown}")
        return self._by_name[space_name]

    def _check_worker(self, worker: int) -> None:
        if not 0 <= worker < self.num_subnetworks:
            raise PlanError(f"worker: got {worker}, takes 0 to {self.num_subnetworks - 1}")
