"""Designs: which owner sets the unit spaces of a model take. A new design is one function here."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.designs.balanced import balanced_windows
from deepspeed_sdp.plan.designs.windows import Windows, joint_gap, shifted_windows, widest_stride, windows
from deepspeed_sdp.plan.gap import components
from deepspeed_sdp.plan.units import OwnerSet

DESIGN_NAMES = ("auto", "cyclic", "random")
# A random pool that leaves the workers apart is drawn again; at 2 classes of pairs this happens, rarely twice.
_RANDOM_TRIES = 100


@dataclass(frozen=True)
class Design:
    """The classes of owner sets that the unit spaces of a model take in turn.

    Attributes:
        name: `"dense"` (`K = N`), `"balanced"` (searched), `"cyclic"` (consecutive workers) or `"random"`.
        classes: one per unit space in turn; every prefix of a balanced design mixes as well as could be found.
        classes_of_few: those of spaces with fewer units than a class has owner sets.
    """

    name: str
    classes: tuple[Windows, ...]
    classes_of_few: tuple[Windows, ...]

    @property
    def owner_sets(self) -> tuple[OwnerSet, ...]:
        """The distinct owner sets, sorted."""
        return tuple(sorted({owners for ring in self.classes for owners in ring.owner_sets}))

    @property
    def spectral_gap(self) -> float:
        """`1 - λ₂(W)` of a model whose unit spaces are equally large and use every class equally often."""
        return joint_gap(self.classes)


def make_design(
    name: str, num_subnetworks: int, owners_per_unit: int, *, max_owner_sets: int = 64, seed: int = 0
) -> Design:
    """Chooses the owner sets for `N` workers and `K` owners per unit.

    The windows of every class have the widest stride: where `K` divides `N` they are teams, and a worker holds one
    slice of each weight, else `K / gcd(N, K)` chunks. Only for `"cyclic"` with such `K` all `N` windows form one class,
    which connects the workers within a single space.

    Args:
        name: `"auto"` (balanced), `"cyclic"` or `"random"`. `K = N` is always `"dense"`.
        num_subnetworks: `N`, at least 1.
        owners_per_unit: `K`, from 1 to `N`.
        max_owner_sets: bound on the distinct owner sets; each becomes a process group.
        seed: of the balanced and the random design.

    Raises:
        PlanError: for values outside these ranges, or when no design fits into `max_owner_sets`.
    """
    check_workers(num_subnetworks, owners_per_unit)
    check_at_least_one("max_owner_sets", max_owner_sets)
    n, k = num_subnetworks, owners_per_unit
    if name not in DESIGN_NAMES:
        raise PlanError(f"design: got {name!r}, takes one of {', '.join(map(repr, DESIGN_NAMES))}")
    name = "dense" if k == n else "balanced" if name == "auto" else name
    per_class = n // widest_stride(n, k)
    # Two partitions are needed, and enough, to connect the workers; sets of one connect nothing anyway.
    needed = per_class if n % k or k in (1, n) else n if name == "cyclic" else 2 * per_class
    if max_owner_sets < needed:
        raise PlanError(
            f"max_owner_sets: got {max_owner_sets}, takes {needed} or more with the {name} design for "
            f"num_subnetworks={n}, owners_per_unit={k}"
        )
    most = max_owner_sets // per_class
    if name == "cyclic":
        shifted = shifted_windows(n, k, most)
        return Design(name, shifted if n % k else (Windows(tuple(range(n)), k, 1),), shifted)
    if name == "random":
        classes = _random_windows(n, k, most, seed, max_owner_sets)
    else:
        classes = balanced_windows(n, k, most, seed) if 1 < k < n else (windows(range(n), k),)
    return Design(name, classes, classes)


def _random_windows(n: int, k: int, most: int, seed: int, max_owner_sets: int) -> tuple[Windows, ...]:
    rng = Random(seed)
    for _ in range(_RANDOM_TRIES):
        classes = tuple(windows(sorted(range(n), key=lambda _: rng.random()), k) for _ in range(most))
        if k == 1 or len(components([owners for ring in classes for owners in ring.owner_sets], n)) == 1:
            return classes
    raise PlanError(
        f"max_owner_sets: got {max_owner_sets}, and {_RANDOM_TRIES} random draws for num_subnetworks={n}, "
        f"owners_per_unit={k} left the workers unconnected; take more, or design='auto'"
    )


def check_workers(num_subnetworks: int, owners_per_unit: int, key: str = "owners_per_unit") -> None:
    """Raises PlanError unless `1 ≤ owners_per_unit ≤ num_subnetworks`, naming the key at fault."""
    check_at_least_one("num_subnetworks", num_subnetworks)
    check_at_least_one(key, owners_per_unit)
    if owners_per_unit > num_subnetworks:
        raise PlanError(
            f"{key}: got {owners_per_unit}, takes 1 to num_subnetworks ({num_subnetworks}): "
            "a unit cannot have more owners than there are workers"
        )


def check_at_least_one(key: str, value: object) -> None:
    """Raises PlanError unless `value` is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{key}: got {value!r}, takes an integer of 1 or more")
