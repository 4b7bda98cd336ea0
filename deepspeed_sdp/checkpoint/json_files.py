"""JSON files, and what must be on the disk."""

import json
import os
from pathlib import Path
from typing import Any

from deepspeed_sdp.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: names the file when it is missing or broken.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint: {path} holds a {type(value).__name__}; takes a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write and fsync."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fsync(path)


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
