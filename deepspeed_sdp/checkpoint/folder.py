"""The folder of a job's checkpoints: complete ones under their tags, and ``latest``, DeepSpeed's name for the newest.

A checkpoint is written into a hidden folder beside the others. Its manifest, with sizes and checksums of all files, is
written last; then the folder takes the place of its tag, and then ``latest`` is replaced. A crash at any moment leaves
the old checkpoint of that tag or the new one, and the old ``latest`` or the new one.

What a rank wrote stands in a manifest of its own, which the mark of the save ties to the others: nothing lists the
files of all ranks.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from deepspeed_sdp.checkpoint.json_files import Count, FileName, Hash, Schema, read_as, write_json
from deepspeed_sdp.checkpoint.lock import is_taken
from deepspeed_sdp.checkpoint.meta import read_meta
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.files import (
    interrupted,
    recover_folder,
    remove_folder,
    remove_unfinished,
    replace_folder,
    staged_folder,
    write_text,
)

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 3

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_log = logging.getLogger(__name__)


class _File(Schema):
    bytes: Count
    sha256: Hash


class _Manifest(Schema):
    format: Literal[3]
    tag: str
    mark: Hash
    ranks: Annotated[int, Field(ge=1, le=1 << 24)]
    files: dict[FileName, _File]
    sha256: Hash


class _OfRank(Schema):
    mark: Hash
    rank: Count
    files: dict[FileName, _File]
    sha256: Hash


@dataclass(frozen=True)
class Manifest:
    """What was written.

    Attributes:
        mark: of the save.
        ranks: how many took part in it.
        files: size and checksum of the files that no rank wrote for itself, by name.
    """

    mark: str
    ranks: int
    files: Mapping[str, Mapping[str, Any]]


def check_tag(tag: str) -> str:
    """``tag`` if it is a plain name.

    Raises:
        CheckpointError: it could lead out of the folder, or hide.
    """
    if not _TAG.fullmatch(tag) or tag == LATEST:
        raise CheckpointError(f"tag: got {tag!r}; takes letters, digits, '.', '_' and '-', and not {LATEST!r}")
    return tag


def begin(folder: Path, tag: str) -> Path:
    """An empty folder to write checkpoint ``tag`` into; what an earlier crash left of unfinished ones is removed.

    For the job that holds the lock of ``folder`` alone.

    Raises:
        OSError: it cannot be made, or what has the name of ``tag`` is no folder.
    """
    staging, final = staged_folder(folder / check_tag(tag)), folder / tag
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final))
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    staging.mkdir()
    return staging


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def new_mark() -> str:
    """One that no other save has."""
    return secrets.token_hex(32)


def finish_rank(staging: Path, mark: str, rank: int, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what a rank wrote for itself.

    Args:
        files: name -> :func:`describe_file` of :func:`files_of`.
    """
    body = {"mark": mark, "rank": rank, "files": dict(sorted(files.items()))}
    write_json(staging / rank_manifest(rank), {**body, "sha256": _digest(body)})


def finish(staging: Path, final: Path, manifest: Manifest, is_latest: bool = True) -> None:
    """Make what was written into :func:`begin`'s folder the checkpoint ``final``; an older one there is replaced."""
    body = {"format": FORMAT, "tag": final.name, **asdict(manifest), "files": dict(sorted(manifest.files.items()))}
    write_json(staging / MANIFEST, {**body, "sha256": _digest(body)})
    replace_folder(staging, final)
    if is_latest:
        set_latest(final.parent, final.name)


def recover(folder: Path) -> None:
    """Put back what a killed job was about to replace, if no job is about it now.

    Raises:
        OSError: the folder cannot be written.
    """
    missing = interrupted(folder)
    if missing and not is_taken(folder):
        for final in missing:
            recover_folder(final)


def set_latest(folder: Path, tag: str) -> None:
    """Let ``latest`` name ``tag``."""
    write_text(folder / LATEST, tag)


def latest(folder: Path) -> str | None:
    """The tag that ``latest`` names, ``None`` where nothing was saved.

    Raises:
        CheckpointError: the file is no tag.
    """
    try:
        text = (folder / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint: cannot read {folder / LATEST}: {error}") from None
    return check_tag(text)


def tags(folder: Path) -> list[str]:
    """Complete checkpoints in the order of their steps; those that do not say it come first."""
    found = [path.parent for path in folder.glob(f"*/{MANIFEST}") if _TAG.fullmatch(path.parent.name)]
    return [path.name for path in sorted(found, key=lambda path: (_step_of(path, -1), path.name))]


def _step_of(checkpoint: Path, default: int) -> int:
    with suppress(CheckpointError):
        return int(read_meta(checkpoint)["global_steps"])
    return default


def latest_step(folder: Path) -> int:
    """The step of what ``latest`` names, -1 where a job could not go on from it."""
    return _step_of(folder / str(latest(folder)), -1) if has_checkpoint(folder) else -1


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; what became of its files since is :func:`damage`."""
    return (checkpoint / MANIFEST).is_file()


def has_checkpoint(folder: Path) -> bool:
    """Whether a job could go on from what ``latest`` names in ``folder``."""
    try:
        tag = latest(folder)
    except CheckpointError:
        return False
    return tag is not None and is_complete(folder / tag)


def rank_manifest(rank: int) -> str:
    """Name of the file that says what a rank wrote."""
    return f"rank-{rank:05d}.json"


def files_of(rank: int) -> tuple[str, str]:
    """What every rank writes for itself: its random numbers, and its tensors."""
    return f"rank-{rank:05d}.pt", f"tensors-{rank:05d}.safetensors"


def read_manifest(checkpoint: Path) -> Manifest:
    """What was written.

    Raises:
        CheckpointError: there is no manifest, it is damaged, or of another format.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint: there is no {checkpoint}{_offer(checkpoint)}")
    try:
        manifest = read_as(checkpoint / MANIFEST, _Manifest).model_dump()
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(checkpoint)}") from None
    if manifest.pop("sha256") != _digest(manifest):
        raise CheckpointError(f"checkpoint: {checkpoint / MANIFEST} is damaged{_offer(checkpoint)}")
    return Manifest(manifest["mark"], manifest["ranks"], manifest["files"])


def damage(checkpoint: Path, manifest: Manifest, part: int = 0, parts: int = 1, is_read: bool = True) -> dict[str, str]:
    """What is wrong with files that differ from the manifests, or are in none, by name.

    Args:
        part, parts: only that part of the ranks and of the other files is looked at.
        is_read: whether files are read and compared, beside the manifests.
    """
    found = {}
    listed = {name: manifest.files[name] for name in sorted(manifest.files)[part::parts]}
    for rank in range(part, manifest.ranks, parts):
        name = rank_manifest(rank)
        try:
            listed.update(files_of_rank(checkpoint, manifest, rank))
        except CheckpointError as error:
            found[name] = str(error).removeprefix("checkpoint: ")
            found.update((file, f"{checkpoint / file} is in no manifest") for file in files_of(rank))
    return found | damage_of(checkpoint, listed) if is_read else found


def damage_of(checkpoint: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong with ``files`` that differ from what a manifest says of them, by name."""
    found = ((name, _difference(checkpoint / name, written)) for name, written in files.items())
    return {name: problem for name, problem in found if problem}


def files_of_rank(checkpoint: Path, manifest: Manifest, rank: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of what a rank wrote for itself, by name.

    Raises:
        CheckpointError: its manifest is missing, broken, or does not belong to ``manifest``.
    """
    path = checkpoint / rank_manifest(rank)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: {path} is missing")
    of_rank = read_as(path, _OfRank).model_dump()
    files: dict[str, dict[str, Any]] = of_rank["files"]
    if of_rank.pop("sha256") != _digest(of_rank) or (of_rank["mark"], of_rank["rank"]) != (manifest.mark, rank):
        raise CheckpointError(f"checkpoint: {path} is damaged, or not of this checkpoint")
    for name in files_of(rank):
        if name not in files:
            raise CheckpointError(f"checkpoint: {path} does not list {name}")
    if len(files) > len(files_of(rank)):
        raise CheckpointError(f"checkpoint: {path} lists what is not of its rank")
    return files


def _difference(path: Path, written: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        size = path.stat().st_size
        if size != written["bytes"]:
            return f"{path} has {size} bytes; it was written with {written['bytes']}"
        if describe_file(path)["sha256"] != written["sha256"]:
            return f"{path} is damaged: its checksum differs from the manifest's"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def damaged(checkpoint: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that is not used, with an older one to take instead."""
    return CheckpointError(f"checkpoint: {what}{_offer(checkpoint)}")


def remove_old(folder: Path, keep_last: int, keep_every: int = 0, saved: str | None = None) -> None:
    """Remove all but the checkpoints of the ``keep_last`` latest steps (0: none is removed) and what ``latest`` names.

    Those whose step is a multiple of ``keep_every`` stay, too, and the one that was just ``saved``, whatever its step.
    What cannot be read or removed is said, and stays.
    """
    if not keep_last:
        return
    steps = {tag: _step_of(folder / tag, -1) for tag in tags(folder)}
    for tag in (tag for tag, step in steps.items() if step < 0):
        _log.warning("checkpoint: %s is damaged, and is left alone", folder / tag)
    known = [tag for tag, step in steps.items() if step >= 0]
    try:
        protected = {latest(folder), saved, *known[-keep_last:]}
        for tag in known:
            if tag not in protected and not (keep_every and steps[tag] % keep_every == 0):
                remove_folder(folder / tag)
    except (OSError, CheckpointError) as error:
        _log.warning("checkpoint: old ones in %s are left: %s", folder, error)


def _offer(checkpoint: Path) -> str:
    others = [tag for tag in tags(checkpoint.parent) if tag != checkpoint.name] if checkpoint.parent.is_dir() else []
    return f"; complete ones there: {', '.join(reversed(others))}" if others else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
