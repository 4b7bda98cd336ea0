"""The JSON form of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan.chunks import Chunk, PlannedSpace
from deepspeed_sdp.plan.units import UnitSpace

if TYPE_CHECKING:
    from deepspeed_sdp.plan.subnetwork_plan import SubnetworkPlan

FORMAT_VERSION = 1

_PLAN_KEYS: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "num_subnetworks": int,
    "owners_per_unit": (int, dict),
    "design": str,
    "seed": int,
    "chunk_multiple": int,
    "owner_sets": list,
    "spaces": list,
}
_SPACE_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "kind": str,
    "layer": int,
    "num_units": int,
    "unit_numel": int,
    "chunks": list,
}
# Left out where they have these values, so that a plan that does not use them keeps its form and hash.
_OPTIONAL_PLAN_KEYS: dict[str, object] = {"shared_flops": 0.0, "worker_capacity": None}
_OPTIONAL_SPACE_KEYS: dict[str, object] = {"unit_flops": 0.0}


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
        **_used(_OPTIONAL_PLAN_KEYS, plan),
        "spaces": [
            {
                **_used(_OPTIONAL_SPACE_KEYS, planned.space),
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
    fields = _read(document, _PLAN_KEYS, "plan", _OPTIONAL_PLAN_KEYS)
    del fields["version"]
    if isinstance(fields["owners_per_unit"], dict):
        fields["owners_per_unit"] = _read(
            fields["owners_per_unit"], dict.fromkeys(fields["owners_per_unit"], int), "plan owners_per_unit"
        )
    if fields.get("worker_capacity") is not None:
        if not isinstance(fields["worker_capacity"], list):
            raise PlanError(f"plan worker_capacity: got {fields['worker_capacity']!r}, takes a list of numbers")
        fields["worker_capacity"] = tuple(_number(value, "plan worker_capacity") for value in fields["worker_capacity"])
    if "shared_flops" in fields:
        fields["shared_flops"] = _number(fields["shared_flops"], "plan shared_flops")
    fields["owner_sets"] = tuple(_integers(owners, "plan owner_sets") for owners in fields["owner_sets"])
    spaces = []
    for index, entry in enumerate(fields["spaces"]):
        space = _read(entry, _SPACE_KEYS, f"plan spaces[{index}]", _OPTIONAL_SPACE_KEYS)
        if "unit_flops" in space:
            space["unit_flops"] = _number(space["unit_flops"], f"plan unit_flops of {space['name']!r}")
        chunks = [_integers(chunk, f"plan chunk of {space['name']!r}", 3) for chunk in space.pop("chunks")]
        spaces.append(PlannedSpace(UnitSpace(**space), tuple(Chunk(*chunk) for chunk in chunks)))
    fields["spaces"] = tuple(spaces)
    return fields


def _used(optional: Mapping[str, object], source: object) -> dict[str, object]:
    return {key: getattr(source, key) for key, default in optional.items() if getattr(source, key) != default}


def _read(
    entry: object,
    keys: Mapping[str, type | tuple[type, ...]],
    where: str,
    optional: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise PlanError(f"{where}: got {entry!r}, takes an object")
    for key, kind in keys.items():
        if key not in entry:
            raise PlanError(f"{where}: the key {key!r} is missing")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # bool is a subclass of int, and `true` is no number of workers.
        if type(entry[key]) not in kinds:
            takes = " or ".join(k.__name__ for k in kinds)
            raise PlanError(f"{where}: {key!r} got {entry[key]!r}, takes {takes}")
    unknown = sorted(set(entry) - set(keys) - set(optional or ()))
    if unknown:
        raise PlanError(f"{where}: unknown key {unknown[0]!r}, takes {', '.join(keys)}")
    return dict(entry)


def _number(value: object, where: str) -> float:
    if type(value) not in (int, float):
        raise PlanError(f"{where}: got {value!r}, takes a number")
    return float(value)  # type: ignore[arg-type]


def _integers(value: object, where: str, length: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise PlanError(f"{where}: got {value!r}, takes a list of integers")
    if length is not None and len(value) != length:
        raise PlanError(f"{where}: got {value!r}, takes {length} integers")
    return tuple(value)
