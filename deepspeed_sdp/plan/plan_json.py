"""The JSON form of a plan."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.chunks import Chunk, PlannedSpace
from deepspeed_sdp.plan.units import UnitSpace

if TYPE_CHECKING:
    from deepspeed_sdp.plan.subnetwork_plan import SubnetworkPlan

FORMAT_VERSION = 1

_PLAN_KEYS: dict[str, type] = {
    "version": int,
    "num_subnetworks": int,
    "owners_per_unit": int,
    "design": str,
    "seed": int,
    "chunk_multiple": int,
    "owner_sets": list,
    "spaces": list,
}
_SPACE_KEYS: dict[str, type] = {
    "name": str,
    "kind": str,
    "layer": int,
    "num_units": int,
    "unit_numel": int,
    "chunks": list,
}


def dump(plan: SubnetworkPlan, indent: int | None = None) -> str:
    """Sorted keys; without `indent` no blanks. A chunk is `[start, stop, owner_set]`."""
    document = {
        "version": FORMAT_VERSION,
        "num_subnetworks": plan.num_subnetworks,
        "owners_per_unit": plan.owners_per_unit,
        "design": plan.design,
        "seed": plan.seed,
        "chunk_multiple": plan.chunk_multiple,
        "owner_sets": plan.owner_sets,
        "spaces": [
            {
                "name": planned.space.name,
                "kind": planned.space.kind,
                "layer": planned.space.layer,
                "num_units": planned.space.num_units,
                "unit_numel": planned.space.unit_numel,
                "chunks": [(chunk.start, chunk.stop, chunk.owner_set) for chunk in planned.chunks],
            }
            for planned in plan.spaces
        ],
    }
    return json.dumps(document, sort_keys=True, indent=indent, separators=(",", ":") if indent is None else None)


def parse(text: str) -> dict[str, Any]:
    """The fields of `SubnetworkPlan` from what `dump` wrote. Their form is checked, the guarantees of a plan are not.

    Raises:
        PlanError: for malformed JSON, another version, missing or unknown keys, and values of a wrong type.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise PlanError(f"plan: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise PlanError(f"plan: got a JSON {type(document).__name__}, takes an object")
    version = document.get("version")
    if version != FORMAT_VERSION:
        raise PlanError(f"plan version: got {version!r}, takes {FORMAT_VERSION}")
    fields = _read(document, _PLAN_KEYS, "plan")
    del fields["version"]
    fields["owner_sets"] = tuple(_integers(owners, "plan owner_sets") for owners in fields["owner_sets"])
    spaces = []
    for index, entry in enumerate(fields["spaces"]):
        space = _read(entry, _SPACE_KEYS, f"plan spaces[{index}]")
        chunks = [_integers(chunk, f"plan chunk of {space['name']!r}", 3) for chunk in space.pop("chunks")]
        spaces.append(PlannedSpace(UnitSpace(**space), tuple(Chunk(*chunk) for chunk in chunks)))
    fields["spaces"] = tuple(spaces)
    return fields


def _read(entry: object, keys: dict[str, type], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise PlanError(f"{where}: got {entry!r}, takes an object")
    for key, kind in keys.items():
        if key not in entry:
            raise PlanError(f"{where}: the key {key!r} is missing")
        # bool is a subclass of int, and `true` is no number of workers.
        if type(entry[key]) is not kind:
            raise PlanError(f"{where}: {key!r} got {entry[key]!r}, takes {kind.__name__}")
    unknown = sorted(set(entry) - set(keys))
    if unknown:
        raise PlanError(f"{where}: unknown key {unknown[0]!r}, takes {', '.join(keys)}")
    return dict(entry)


def _integers(value: object, where: str, length: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise PlanError(f"{where}: got {value!r}, takes a list of integers")
    if length is not None and len(value) != length:
        raise PlanError(f"{where}: got {value!r}, takes {length} integers")
    return tuple(value)
