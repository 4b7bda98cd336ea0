"""The JSON form of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.json_text import parse_json, shown
from deepspeed_sdp.plan.units import Chunk, PlannedSpace, UnitSpace

if TYPE_CHECKING:
    from deepspeed_sdp.plan.plan import SubnetworkPlan

FORMAT_VERSION = 1

# Bounds of what a file may say. Far above any use, so that nothing made from the numbers grows out of hand.
MAX_WORKERS = 2**14
_Name = Annotated[str, Field(min_length=1, max_length=500)]
_Index = Annotated[int, Field(ge=0, le=2**40)]
_Count = Annotated[int, Field(ge=1, le=2**40)]
_Worker = Annotated[int, Field(ge=0, lt=MAX_WORKERS)]
_Owners = Annotated[int, Field(ge=1, le=MAX_WORKERS)]
_Flops = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
_Capacity = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Space(_Form):
    name: _Name
    kind: _Name
    layer: _Index
    num_units: _Count
    unit_numel: _Count
    unit_flops: _Flops = 0.0
    chunks: list[Annotated[list[_Index], Field(min_length=3, max_length=3)]] = Field(min_length=1)


class _Plan(_Form):
    version: int
    num_subnetworks: _Owners
    owners_per_unit: _Owners | dict[_Name, _Owners]
    design: _Name
    seed: int = Field(ge=-(2**63), lt=2**63)
    chunk_multiple: _Count
    owner_sets: list[Annotated[list[_Worker], Field(min_length=1, max_length=MAX_WORKERS)]] = Field(min_length=1)
    spaces: list[_Space] = Field(min_length=1, max_length=4096)
    shared_flops: _Flops = 0.0
    worker_capacity: Annotated[list[_Capacity], Field(max_length=MAX_WORKERS)] | None = None


def dump(plan: SubnetworkPlan, indent: int | None = None) -> str:
    """Sorted keys, those with their default left out; without `indent` no blanks. A chunk is `[start, stop, set]`."""
    spaces = [
        _Space.model_construct(**vars(planned.space), chunks=list(map(list, planned.chunks))) for planned in plan.spaces
    ]
    form = _Plan.model_construct(version=FORMAT_VERSION, **{**vars(plan), "spaces": spaces})
    document = form.model_dump(exclude_defaults=True, warnings=False)
    return json.dumps(document, sort_keys=True, indent=indent, separators=(",", ":") if indent is None else None)


def parse(text: str) -> dict[str, Any]:
    """The fields of `SubnetworkPlan` from what `dump` wrote. Their form is checked, the guarantees of a plan are not.

    Raises:
        PlanError: for malformed JSON, another version, missing or unknown keys, and values of a wrong type or size.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise PlanError(f"plan: {error}") from None
    if not isinstance(document, dict):
        raise PlanError(f"plan: got a JSON {type(document).__name__}, takes an object")
    version = document.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise PlanError(f"plan version: got {shown(version)}, takes {FORMAT_VERSION}")
    try:
        form = _Plan.model_validate(document)
    except ValidationError as error:
        raise PlanError(_describe(error.errors(include_url=False)[0])) from None
    fields = dict(form) | {
        "owner_sets": tuple(map(tuple, form.owner_sets)),
        "worker_capacity": None if form.worker_capacity is None else tuple(form.worker_capacity),
        "spaces": tuple(
            PlannedSpace(UnitSpace(**{k: v for k, v in space if k != "chunks"}), tuple(Chunk(*c) for c in space.chunks))
            for space in form.spaces
        ),
    }
    del fields["version"]
    return fields


def _describe(error: Mapping[str, Any]) -> str:
    where = "plan"
    for part in error["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f" {shown(part)[1:-1]}"
    if error["type"] == "missing":
        return f"{where}: this key is missing"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    return f"{where}: got {shown(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"
