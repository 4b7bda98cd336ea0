"""JSON objects from files, held to a schema with bounds before anything is made of them."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.json_text import parse_json, shown

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
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from None
    except UnicodeDecodeError:
        raise error(f"{path}: is not a text file") from None
    except ValueError as reason:
        raise error(f"{path}: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds {shown(value)}; takes a JSON object")
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
        key = ".".join(shown(part).strip('"') for part in first["loc"])
        if first["type"] == "missing":
            raise error(f"{place}: {key}: got nothing; it is required") from None
        takes = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise error(f"{place}: {key}: got {shown(first['input'])}; {takes}") from None
