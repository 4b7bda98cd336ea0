"""JSON objects in files that a user names."""

from pathlib import Path
from typing import Any

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.json_text import parse_json, read_json_text


def read_json(path: str | Path, key: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: names ``key`` and the file when it is missing, unreadable, too large, or holds no JSON object.
    """
    try:
        value = parse_json(read_json_text(Path(path)))
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {path} {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {path} holds a {type(value).__name__}; takes a JSON object")
    return value
