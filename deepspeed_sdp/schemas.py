"""JSON from files, held to a schema with bounds before anything is made of it."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.json_text import MAX_BYTES, parse_json, read_json_text, shown

T = TypeVar("T")

# Numbers of bytes, tokens and the like: they fit an int64, and so do their sums.
Count = Annotated[int, Field(ge=0, le=1 << 60)]


class Schema(BaseModel):
    """Nothing is converted, and keys that a schema does not name are left alone: other versions may write more."""

    # Some versions of pydantic warn of names that begin with "model_", which are ours.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def read_object(path: Path, schema: type[BaseModel], error: type[SDPError]) -> dict[str, Any]:
    """The JSON object in a file, as it stands there.

    Raises:
        error: in one line: the file is missing, holds no JSON object, or not what ``schema`` takes.
    """
    value = read_value(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: holds {shown(value)}; takes a JSON object")
    check_value(value, schema, error, str(path))
    return value


def read_value(path: Path, error: type[SDPError], max_bytes: int = MAX_BYTES) -> Any:
    """Whatever JSON value is in a file.

    Raises:
        error: in one line: the file is missing, too large or no JSON.
    """
    try:
        return parse_json(read_json_text(path, max_bytes))
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from None
    except ValueError as reason:
        raise error(f"{path}: {reason}") from None


def check_value(value: Any, kind: type[T] | TypeAdapter[T], error: type[SDPError], place: str) -> T:
    """``value`` as ``kind``.

    Raises:
        error: in one line: ``place``, the first key that is wrong, what it got and what it takes.
    """
    try:
        return (kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)).validate_python(value)
    except ValidationError as found:
        first = found.errors(include_url=False, include_context=False)[0]
        key = ".".join(shown(part).strip('"') for part in first["loc"]) or "it"
        if first["type"] == "missing":
            raise error(f"{place}: {key}: got nothing; it is required") from None
        takes = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise error(f"{place}: {key}: got {shown(first['input'])}; {takes}") from None
    except RecursionError:
        raise error(f"{place}: is nested too deeply") from None
