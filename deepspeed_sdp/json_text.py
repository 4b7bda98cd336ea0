"""JSON that others wrote, read strictly and in bounded time and memory."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

# Far more than any plan or configuration has; what a hostile file can make a reader allocate is a few times that.
MAX_BYTES = 16 * 2**20
_PIECE = 2**16
_MAX_DIGITS = 40
_SHOWN = 80


def read_json_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than ``max_bytes``, or not UTF-8; the message goes on after the file's name.
    """
    data = bytearray()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            data += piece
            if len(data) > max_bytes:
                raise ValueError(f"is larger than {max_bytes >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not a text file") from None


def parse_json(text: str) -> Any:
    """A JSON value, without what Python's parser allows besides: ``NaN``, infinite numbers and keys that stand twice.

    Raises:
        ValueError: with one line that goes on after the file's name: "is not valid JSON: ...".
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("is not valid JSON: it is nested too deeply") from None


def shown(value: object) -> str:
    """A value for an error message, on one line of at most about 80 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict) and len(value) > _SHOWN:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} values"
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError, TypeError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"is not valid JSON: the key {shown(again)} stands twice in an object")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"is not valid JSON: got {name}, takes finite numbers")


def _float(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise ValueError(f"is not valid JSON: got {digits[:40]}, takes finite numbers")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"is not valid JSON: got an integer of {len(digits)} digits, takes at most {_MAX_DIGITS}")
    return int(digits)
