"""The JSON files of a checkpoint, read through schemas."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter

from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.files import fsync
from deepspeed_sdp.schemas import Schema as AnySchema
from deepspeed_sdp.schemas import check_value, read_value

T = TypeVar("T")

# No index of a job comes near.
_MOST_BYTES = 1 << 30

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Schema(AnySchema):
    """Base of what is in a checkpoint: nothing unknown besides."""

    model_config = ConfigDict(extra="forbid")


def read_as(path: Path, kind: type[T] | TypeAdapter[T]) -> T:
    """The JSON of a file as ``kind``.

    Raises:
        CheckpointError: names the file, and the place in it, when it is missing, broken or of another form.
    """
    return check(read_value(path, CheckpointError, _MOST_BYTES), kind, str(path))


def check(value: Any, kind: type[T] | TypeAdapter[T], where: str) -> T:
    """``value`` as ``kind``.

    Raises:
        CheckpointError: names ``where``, and the place in it, when it has another form.
    """
    return check_value(value, kind, CheckpointError, f"checkpoint: {where}")


def write_json(path: Path, value: Any) -> None:
    """Write and fsync."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fsync(path)
