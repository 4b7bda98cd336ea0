"""What a folder of shards says about itself."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field

from deepspeed_sdp.data.shard_writer import file_sizes, shards_of
from deepspeed_sdp.errors import DataError
from deepspeed_sdp.json_text import shown
from deepspeed_sdp.schemas import Count, Schema, read_object

# Changes with what is made of the same text, or with how it is stored.
FORMAT = 1
NAME = "manifest.json"
TOKENIZER = "tokenizer"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Format(Schema):
    format: int


class File(Schema):
    """Of a list of files."""

    name: str = Field(min_length=1, max_length=1000)
    bytes: Count
    sha256: _Sha256


class _Split(Schema):
    tokens: Count
    documents: Count
    bytes: Count
    characters: Count
    shards: Count


class _Splits(Schema):
    train: _Split
    heldout: _Split


class _Tokenizer(Schema):
    sha256: _Sha256
    origin: str = Field(alias="from")
    vocab_size: int = Field(ge=1, le=1 << 32)
    eos_token_id: Count
    bos_token_id: Count | None


class _Source(Schema):
    paths: list[str] = Field(min_length=1)
    config: str | None
    files: list[Any]


class _Request(Schema):
    source: _Source


class Skips(Schema):
    """What was skipped for one reason."""

    count: int = Field(ge=1, le=1 << 60)
    first: list[str] = Field(min_length=1)


class _Manifest(Schema):
    format: Literal[1]
    fingerprint: _Sha256
    request: _Request
    commit: str | None
    tokenizer: _Tokenizer
    dtype: Literal["<u2", "<u4"]
    shard_tokens: int = Field(ge=1, le=1 << 60)
    splits: _Splits
    skipped: dict[str, Skips]
    seconds: float = Field(ge=0)
    files: list[File]


def fingerprint(request: Mapping[str, Any]) -> str:
    """Of everything that decides over the content of the shards."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **request}, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished shards, which lists every file that its figures take.

    Raises:
        DataError: there are none, they were made by another version, or the manifest is damaged or contradicts itself.
    """
    path = folder / NAME
    if not path.exists():
        raise DataError(f"{folder}: holds no finished shards; 'deepspeed-sdp data' makes them")
    made_by = read_object(path, _Format, DataError)["format"]
    if made_by != FORMAT:
        raise DataError(f"{folder}: has format {shown(made_by)}; this version takes {FORMAT}")
    manifest = read_object(path, _Manifest, DataError)
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Mapping[str, Any]) -> None:
    sizes: dict[str, int] = {}
    for file in manifest["files"]:
        name = file["name"]
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or parts.as_posix() != name or "\0" in name:
            raise DataError(f"{path}: lists {shown(name)}; takes names of files within the folder")
        if name in sizes:
            raise DataError(f"{path}: lists {shown(name)} twice")
        sizes[name] = file["bytes"]
    vocab_size, width = manifest["tokenizer"]["vocab_size"], int(manifest["dtype"][-1])
    if vocab_size > 1 << 8 * width or max(_special_ids(manifest)) >= vocab_size:
        raise DataError(f"{path}: a vocabulary of {vocab_size} does not go with its dtype and special tokens")
    for split, counts in manifest["splits"].items():
        if counts["shards"] != shards_of(counts["tokens"], manifest["shard_tokens"]) or counts["shards"] > len(sizes):
            raise DataError(f"{path}: lists {len(sizes)} files; {counts['tokens']} {split} tokens take others")
        if bool(counts["documents"]) != bool(counts["tokens"]) or counts["documents"] > counts["tokens"]:
            raise DataError(f"{path}: has {counts['documents']} {split} documents of {counts['tokens']} tokens")
        for name, size in file_sizes(split, counts, manifest["shard_tokens"], width).items():
            if sizes.get(name) != size:
                got = f"with {sizes[name]} bytes" if name in sizes else "not at all"
                raise DataError(f"{path}: lists {name} {got}; its figures take {size} bytes")
    if not any(name.startswith(f"{TOKENIZER}/") for name in sizes):
        raise DataError(f"{path}: lists no file of a tokenizer")


def _special_ids(manifest: Mapping[str, Any]) -> list[int]:
    about = manifest["tokenizer"]
    return [about["eos_token_id"], *([] if about["bos_token_id"] is None else [about["bos_token_id"]])]


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file's size with the manifest, and the tokenizer's content, of which all files are read.

    Raises:
        DataError: a file is missing, has another size, lies outside of the folder, or is the tokenizer's and differs
            or is not listed.
    """
    whole = folder.resolve()
    listed = {file["name"]: file for file in manifest["files"]}
    found = {path.relative_to(folder).as_posix() for path in (folder / TOKENIZER).rglob("*") if not path.is_dir()}
    if found - listed.keys():
        raise DataError(f"{folder / NAME}: does not list {min(found - listed.keys())}; takes the folder as it was made")
    for name, file in listed.items():
        path = folder / name
        try:
            if not path.resolve().is_relative_to(whole) or not path.is_file():
                raise DataError(f"{path}: is no file within {folder}")
            size = path.stat().st_size
            is_changed = name.startswith(f"{TOKENIZER}/") and size == file["bytes"] and checksum(path) != file["sha256"]
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if size != file["bytes"]:
            raise DataError(f"{path}: has {size} bytes; the manifest says {file['bytes']}")
        if is_changed:
            raise DataError(f"{path}: differs from the manifest's checksum")


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
