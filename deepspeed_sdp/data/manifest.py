"""What a folder of shards says about itself."""

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed_sdp.errors import DataError

# Changes with what is made of the same text, or with how it is stored.
FORMAT = 1
NAME = "manifest.json"
_KEYS = {"format", "fingerprint", "request", "tokenizer", "dtype", "shard_tokens", "splits", "files", "skipped"}


def fingerprint(request: Mapping[str, Any]) -> str:
    """Of everything that decides over the content of the shards."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **request}, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished shards.

    Raises:
        DataError: there are none, or they were made by another version.
    """
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: holds no finished shards; 'deepspeed-sdp data' makes them") from None
    except OSError as error:
        raise DataError(f"{folder / NAME}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{folder / NAME}: is damaged: {error}") from None
    if not isinstance(manifest, dict) or not set(manifest) >= _KEYS:
        raise DataError(f"{folder / NAME}: is no manifest of shards")
    if manifest["format"] != FORMAT:
        raise DataError(f"{folder}: has format {manifest['format']}; this version takes {FORMAT}")
    return manifest


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the size of every file with the manifest.

    Raises:
        DataError: a file is missing or has another size.
    """
    for file in manifest["files"]:
        path = folder / file["name"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if size != file["bytes"]:
            raise DataError(f"{path}: has {size} bytes; the manifest says {file['bytes']}")


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Name of every file and whether its checksum is another than the manifest's; reads everything."""
    for file in manifest["files"]:
        yield file["name"], checksum(folder / file["name"]) != file["sha256"]


def list_files(folder: Path, but: Collection[str] = ()) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of every file below ``folder``, ``but`` those of these names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return [
        {"name": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": checksum(path)}
        for path in files
    ]


def checksum(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on disk."""
    staging = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
