"""JSON files, read through schemas: nothing is built from what a file says before it is known to have that form."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.files import fsync

T = TypeVar("T")

# No index of a job comes near.
_MOST_BYTES = 1 << 30

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Schema(BaseModel):
    """Base of what is in a file: no conversions, nothing unknown, and no number that is none."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def read_as(path: Path, kind: type[T] | TypeAdapter[T]) -> T:
    """The JSON of a file as ``kind``.

    Raises:
        CheckpointError: names the file, and the place in it, when it is missing, broken or of another form.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"checkpoint: {path} has more than {_MOST_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None
    return check(value, kind, str(path))


def check(value: Any, kind: type[T] | TypeAdapter[T], where: str) -> T:
    """``value`` as ``kind``.

    Raises:
        CheckpointError: names ``where``, and the place in it, when it has another form.
    """
    try:
        return (kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        got = repr(first["input"])[:80]
        raise CheckpointError(f"checkpoint: {where}: {place or 'it'}: {first['msg']}, got {got}") from None
    except RecursionError:
        raise CheckpointError(f"checkpoint: {where}: nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Write and fsync."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fsync(path)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} stands there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
