"""Which owner sets each unit space gets: the classes of a design in turn, sets unit by unit, or arcs by capacity."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from deepspeed_sdp.plan.capacity import arrangements, arrangements_for, units_in_turn
from deepspeed_sdp.plan.classes import OwnerSet, ParallelClass, covers_evenly, window_class
from deepspeed_sdp.plan.cutting import Cut, Tally, coverage_spread, cut_by_arcs, cut_by_unit, cut_evenly
from deepspeed_sdp.plan.designs import Design, make_design
from deepspeed_sdp.plan.sequence import repeated_sequence, windows_in_turn
from deepspeed_sdp.plan.units import UnitSpace

# With this many units per owner set, some chunks can be a unit larger without a worker getting a chunk more.
_UNITS_PER_SET = 16
# With this many units per arc, rounding to whole units is left to the leveling.
_UNITS_PER_ARC = 4
# The most arrangements of the workers by capacity: each adds up to N owner sets.
_MAX_ARRANGEMENTS = 8


def assign_by_design(
    spaces: Sequence[UnitSpace],
    num_workers: int,
    owners_per_unit: int,
    name: str,
    max_owner_sets: int,
    chunk_multiple: int,
    seed: int,
    tally: Tally,
) -> tuple[str, list[Cut]]:
    """Cuts spaces with the same `K`. Returns the name of the design and the cuts, in the order of the spaces.

    Raises:
        PlanError: when no design fits into `max_owner_sets`.
    """
    n, k = num_workers, owners_per_unit
    design = make_design(name, n, k, max_owner_sets=max_owner_sets, seed=seed)
    if design.name == "dense":
        return "dense", [Cut(s, [s.num_units], [tuple(range(n))], 1, (1.0,) * n, adjustable=False) for s in spaces]
    if all(covers_evenly(c, n) for c in design.classes):
        return design.name, _cut_in_turn(spaces, design.classes, tally, chunk_multiple)
    weighted = design.name != "weighted" or not any(_too_few(space.num_units, design) for space in spaces)
    if not weighted:
        # Small spaces need owner sets of their own, and are better off with those that a larger design would take.
        design = make_design(name, n, k, max_owner_sets=max_owner_sets, seed=seed, weighted=False)
    few = [space for space in spaces if _too_few(space.num_units, design)]
    many = [space for space in spaces if not _too_few(space.num_units, design)]
    if few and n % k == 0:
        # Windows around the ring, in partitions: they cover all workers evenly.
        shifted = tuple(window_class(range(n), k, k, first) for first in range(k))
        cuts = _cut_in_turn(few, shifted, tally, chunk_multiple)
        return design.name, _merge(spaces, cuts, _cut_in_turn(many, design.classes, tally, chunk_multiple))
    ring = n // gcd(n, k)
    units = sum(space.num_units for space in few)
    if many and few and len(design.owner_sets) + units > max_owner_sets:
        room = max(ring, max_owner_sets - ring)
        wanted = name if room > ring else "cyclic"
        design = make_design(wanted, n, k, max_owner_sets=room, seed=seed, weighted=weighted)
    room = max_owner_sets - (len(design.owner_sets) if many else 0)
    sequences = _sequences(few, n, k, room, None if design.name == "cyclic" else seed)
    cuts = [cut_by_unit(space, sequences[space.name], (k / n,) * n, tally) for space in few]
    made = _merge(spaces, cuts, _cut_in_turn(many, design.classes, tally, chunk_multiple))
    return design.name if many or design.name == "cyclic" else "sequence", made


def assign_by_capacity(
    spaces: Sequence[UnitSpace],
    shares: Sequence[float],
    max_owner_sets: int,
    chunk_multiple: int,
    seed: int,
    tally: Tally,
) -> list[Cut]:
    """Cuts spaces so that worker `w` owns the fraction `shares[w]` of each.

    Raises:
        PlanError: when no arrangement of the workers fits into `max_owner_sets`.
    """
    found = arrangements(shares, max_owner_sets, min(_MAX_ARRANGEMENTS, len(spaces)), seed)
    pieces = max(len(arrangement.owners) for arrangement in found)
    cuts: list[Cut] = []
    many = [space for space in spaces if space.num_units >= _UNITS_PER_ARC * pieces]
    for i, space in enumerate(many):
        cuts.append(cut_by_arcs(space, found[i % len(found)], shares, tally, chunk_multiple))
    few = [space for space in spaces if space.num_units < _UNITS_PER_ARC * pieces]
    for kind in sorted({space.kind for space in few}):
        of_kind = [space for space in few if space.kind == kind]
        used = arrangements_for(sum(space.num_units for space in of_kind), len(found))
        for i in range(used):
            part = of_kind[i::used]
            sequence = units_in_turn(found[i], [space.num_units for space in part])
            cuts += [cut_by_unit(s, owner_sets, shares, tally) for s, owner_sets in zip(part, sequence, strict=True)]
    return _merge(spaces, cuts)


def _sequences(
    spaces: Sequence[UnitSpace], n: int, k: int, max_owner_sets: int, seed: int | None
) -> dict[str, list[OwnerSet]]:
    """The owner sets of each space, unit by unit: mixed by the seed if they fit, windows if not or without a seed."""
    kinds = [[space for space in spaces if space.kind == kind] for kind in sorted({space.kind for space in spaces})]
    room = max_owner_sets
    mixed: dict[str, list[OwnerSet]] = {}
    for i, of_kind in enumerate(kinds if seed is not None else []):
        sizes = [space.num_units for space in of_kind]
        sequence = repeated_sequence(n, k, sizes, room // (len(kinds) - i), (seed or 0) + i)
        room -= len({owners for owner_sets in sequence for owners in owner_sets})
        mixed.update(zip((space.name for space in of_kind), sequence, strict=True))
    if seed is not None and room >= 0:
        return mixed
    windows: dict[str, list[OwnerSet]] = {}
    for of_kind in kinds:
        sequence = windows_in_turn(n, k, [space.num_units for space in of_kind])
        windows.update(zip((space.name for space in of_kind), sequence, strict=True))
    return windows


def _too_few(num_units: int, design: Design) -> bool:
    """Whether chunks of whole units cannot follow the classes without a worker getting a chunk more than another."""
    whole, rest = divmod(num_units, len(design.classes[0]))
    if whole == 0:
        return True
    if rest == 0 or whole >= _UNITS_PER_SET or design.name in ("cyclic", "random"):
        return False
    return any(coverage_spread(c, rest, design.num_subnetworks) > whole for c in design.classes)


def _cut_in_turn(
    spaces: Sequence[UnitSpace], classes: Sequence[ParallelClass], tally: Tally, chunk_multiple: int
) -> list[Cut]:
    """Cuts every space by its class: one after the other.

    A space with fewer units than its class has owner sets leaves some workers out: the next spaces of its kind then
    stay with the class until every set had its turn, which is what balances whole blocks and a few KV heads.

    With, say, ten classes and attention and MLP in turn, attention would only ever meet the even ones; then each round
    over the classes starts one further.
    """
    count = len(classes)
    drift = int(gcd(count, len({space.kind for space in spaces})) > 1)
    turn = 0
    waiting: dict[str, tuple[ParallelClass, list[OwnerSet]]] = {}
    cuts = []
    for space in spaces:
        if space.kind not in waiting:
            parallel_class = classes[(turn + drift * (turn // count)) % count]
            waiting[space.kind] = parallel_class, list(parallel_class)
            turn += 1
        parallel_class, left = waiting[space.kind]
        if space.num_units < len(parallel_class):
            # A set twice in a space would cover some workers twice before others once.
            again = [owners for owners in parallel_class if owners not in left]
            ranked = sorted(left, key=tally.rank) + sorted(again, key=tally.rank)
            picked = ranked[: space.num_units]
            shares = (len(parallel_class[0]) / len(tally.load),) * len(tally.load)
            cuts.append(cut_by_unit(space, picked, shares, tally))
            left = [owners for owners in left if owners not in picked]
            waiting[space.kind] = parallel_class, left
        else:
            cuts.append(cut_evenly(space, parallel_class, tally, chunk_multiple))
            left = []
        if not left:
            del waiting[space.kind]
    return cuts


def _merge(spaces: Sequence[UnitSpace], *parts: Sequence[Cut]) -> list[Cut]:
    by_name = {cut.space.name: cut for cuts in parts for cut in cuts}
    return [by_name[space.name] for space in spaces]
