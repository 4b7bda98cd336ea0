"""Designs: which owner sets the layers of a model use. A new design is one function here."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from random import Random

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.balanced import balanced_classes
from deepspeed_sdp.plan.classes import OwnerSet, ParallelClass, complement_class, team_class, window_class
from deepspeed_sdp.plan.developed import NEARLY_OPTIMAL, developed_classes
from deepspeed_sdp.plan.mixing import components, spectral_gap, spectral_gap_bound
from deepspeed_sdp.plan.resolvable import resolvable_classes
from deepspeed_sdp.plan.weighted import weighted_classes

DESIGN_NAMES = ("auto", "balanced", "cyclic", "random")
# A random pool that leaves the workers apart is drawn again; at 2 classes of pairs this happens, rarely twice.
_RANDOM_TRIES = 100
# A design that mixes no better than this above windows gives way to them.
_SAME_GAP = 1e-7


@dataclass(frozen=True)
class Design:
    """The parallel classes that the unit spaces of a model take in turn.

    Attributes:
        name: `"dense"` (`K = N`), `"resolvable"` (partitions into teams), `"developed"` (base blocks moved around the
            ring of the workers), `"weighted"` (the same, stored, with more turns for some), `"complement"` (what a
            resolvable or developed design leaves out), `"balanced"` (searched), `"cyclic"` or `"random"`.
        num_subnetworks: `N`.
        owners_per_unit: `K`.
        classes: one per unit space in turn; every prefix mixes as well as could be found. A class that stands in it
            several times gives its owner sets that many times the weight.
    """

    name: str
    num_subnetworks: int
    owners_per_unit: int
    classes: tuple[ParallelClass, ...]

    @property
    def owner_sets(self) -> tuple[OwnerSet, ...]:
        """The distinct owner sets, sorted."""
        return tuple(sorted({owners for parallel_class in self.classes for owners in parallel_class}))

    @property
    def spectral_gap(self) -> float:
        """`1 - λ₂(W)` of a model whose unit spaces are equally large and use every turn equally often."""
        owned = [(owners, 1.0 / len(c)) for c in self.classes for owners in c]
        return spectral_gap(owned, self.num_subnetworks)


def make_design(
    name: str,
    num_subnetworks: int,
    owners_per_unit: int,
    *,
    max_owner_sets: int = 64,
    seed: int = 0,
    weighted: bool = True,
) -> Design:
    """Chooses the owner sets for `N` workers and `K` owners per unit.

    `"auto"` is a resolvable design where `K` divides `N` (one team, so one slice of each weight, per worker and layer),
    else, for `K > N/2`, the complement of the design for `N-K`, which mixes as evenly, else a weighted or developed
    design. Cyclic windows where these do not fit into `max_owner_sets` or mix no better. `K = N` is always `"dense"`.

    Args:
        name: `"auto"`, `"balanced"`, `"cyclic"` or `"random"`.
        num_subnetworks: `N`, at least 1.
        owners_per_unit: `K`, from 1 to `N`.
        max_owner_sets: bound on the distinct owner sets; each becomes a process group.
        seed: of the random and the searched designs.
        weighted: whether stored designs with unequally many turns of their classes may be taken.

    Raises:
        PlanError: for values outside these ranges, or when no design fits into `max_owner_sets`.
    """
    check_workers(num_subnetworks, owners_per_unit)
    if name not in DESIGN_NAMES:
        raise PlanError(f"design: got {name!r}, takes one of {', '.join(map(repr, DESIGN_NAMES))}")
    n, k = num_subnetworks, owners_per_unit
    if k == n:
        _check_max_owner_sets("dense", n, k, 1, max_owner_sets)
        return Design("dense", n, k, ((tuple(range(n)),),))
    if name == "random":
        return _random_design(n, k, max_owner_sets, seed)
    if name == "balanced":
        per_class = n // gcd(n, k)
        _check_max_owner_sets("balanced", n, k, per_class if n % k else _fewest_teams(n, k), max_owner_sets)
        return Design("balanced", n, k, tuple(balanced_classes(n, k, max_owner_sets // per_class, seed)))
    if name == "cyclic":
        return _cyclic_design(n, k, max_owner_sets)
    if n % k == 0:
        _check_max_owner_sets("resolvable", n, k, _fewest_teams(n, k), max_owner_sets)
        return Design("resolvable", n, k, tuple(resolvable_classes(n, k, max_owner_sets, seed)))
    windows = _cyclic_design(n, k, max_owner_sets)
    evener = _evener_design(n, k, max_owner_sets, seed, weighted)
    return windows if evener is None or evener.spectral_gap <= windows.spectral_gap + _SAME_GAP else evener


def _evener_design(n: int, k: int, max_owner_sets: int, seed: int, weighted: bool) -> Design | None:
    """A design whose pairs meet more evenly than in windows, where `K` does not divide `N`; None if it does not fit."""
    check_at_least_one("max_owner_sets", max_owner_sets)
    if 2 * k < n:
        return _developed_design(n, k, max_owner_sets, seed, weighted)
    rest = n - k
    if n % rest:
        missing = developed_classes(n, rest, max_owner_sets, seed)
    elif _fewest_teams(n, rest) <= max_owner_sets:
        missing = resolvable_classes(n, rest, max_owner_sets, seed)
    else:
        missing = []
    return Design("complement", n, k, tuple(complement_class(c, n) for c in missing)) if missing else None


def _developed_design(n: int, k: int, max_owner_sets: int, seed: int, weighted: bool) -> Design | None:
    """The stored design if there is one that is nearly optimal, else the better one of it and a searched one."""
    candidates = []
    stored = weighted_classes(n, k, max_owner_sets) if weighted else []
    if stored:
        candidates.append(Design("weighted", n, k, tuple(stored)))
        if candidates[0].spectral_gap >= NEARLY_OPTIMAL * spectral_gap_bound(n, k):
            return candidates[0]
    searched = developed_classes(n, k, max_owner_sets, seed)
    if searched:
        candidates.append(Design("developed", n, k, tuple(searched)))
    return max(candidates, key=lambda design: design.spectral_gap, default=None)


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


def _cyclic_design(n: int, k: int, max_owner_sets: int) -> Design:
    """Windows `{c, …, c+K-1}` modulo `N`.

    Where `K` does not divide `N` the windows are dealt to `gcd(N, K)` classes: a worker then holds `K / gcd(N, K)`
    chunks of a space, the fewest possible. Where it does, such classes would be partitions, which the resolvable
    design does better: here all `N` windows form one class, which connects the workers within a single space.
    """
    stride = gcd(n, k) if n % k else 1
    per_class = n // stride
    _check_max_owner_sets("cyclic", n, k, per_class, max_owner_sets)
    classes = tuple(window_class(range(n), k, stride, c) for c in range(min(stride, max_owner_sets // per_class)))
    return Design("cyclic", n, k, classes)


def _random_design(n: int, k: int, max_owner_sets: int, seed: int) -> Design:
    """Random partitions into teams where `K` divides `N`, else cyclic windows of randomly ordered workers."""
    per_class = n // gcd(n, k)
    needed = per_class if n % k else _fewest_teams(n, k)
    _check_max_owner_sets("random", n, k, needed, max_owner_sets)
    rng = Random(seed)
    for _ in range(_RANDOM_TRIES):
        orders = [sorted(range(n), key=lambda _: rng.random()) for _ in range(max_owner_sets // per_class)]
        if n % k:
            classes = tuple(window_class(order, k, gcd(n, k)) for order in orders)
        else:
            classes = tuple(team_class(order, k) for order in orders)
        if k == 1 or len(components([owners for c in classes for owners in c], n)) == 1:
            return Design("random", n, k, classes)
    raise PlanError(
        f"max_owner_sets: got {max_owner_sets}, and {_RANDOM_TRIES} random draws for num_subnetworks={n}, "
        f"owners_per_unit={k} left the workers unconnected; take {2 * needed} or more, or design='auto'"
    )


def _fewest_teams(n: int, k: int) -> int:
    """Two partitions are needed, and enough, to connect the workers; singletons connect nothing anyway."""
    return n if k == 1 else 2 * n // k


def _check_max_owner_sets(design: str, n: int, k: int, needed: int, max_owner_sets: int) -> None:
    check_at_least_one("max_owner_sets", max_owner_sets)
    if max_owner_sets < needed:
        raise PlanError(
            f"max_owner_sets: got {max_owner_sets}, takes {needed} or more with the {design} design for "
            f"num_subnetworks={n}, owners_per_unit={k}"
        )
