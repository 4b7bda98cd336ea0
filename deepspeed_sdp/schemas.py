"""JSON objects from files, held to a schema with bounds before anything is made of them."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepspeed_sdp.config import read_json
from deepspeed_sdp.errors import ConfigError, SDPError

# Of what was got, so much is repeated in a message.
_SHOWN = 60

# Numbers of bytes, tokens and the like: they fit an int64, and so do their sums.
Count = Annotated[int, Field(ge=0, le=1 << 60)]


class Schema(BaseModel):
    """Nothing is converted, and keys that a schema does not name are left alone: other versions may write more."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


def read_object(path: Path, schema: type[BaseModel], error: type[SDPError]) -> dict[str, Any]:
    """The JSON object in a file, as it stands there.

    Raises:
        error: in one line: the file is missing, holds no JSON object, or not what ``schema`` takes.
    """
    try:
        value = read_json(path, path.name)
    except ConfigError as reason:
        raise error(str(reason)) from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, thousands of brackets
        raise error(f"{path.name}: {path} is not usable JSON") from None
    check_object(value, schema, error, str(path))
    return value


def check_object(value: Any, schema: type[BaseModel], error: type[SDPError], place: str) -> None:
    """Compare with ``schema``.

    Raises:
        error: in one line: ``place``, the first key that is wrong, what it got and what it takes.
    """
    try:
        schema.model_validate(value)
    except ValidationError as found:
        first = found.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "JSON"
        got = "nothing" if first["type"] == "missing" else shown(first["input"])
        message = "is required" if first["type"] == "missing" else f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise error(f"{place}: {key}: got {got}; {message}") from None


def shown(value: Any) -> str:
    """A value in a message: one line, and not all of a long one."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
