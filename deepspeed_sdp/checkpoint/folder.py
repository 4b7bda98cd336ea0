"""The folder of a job's checkpoints: complete ones under their tags, and ``latest``, DeepSpeed's name for the newest.

A checkpoint is written into a hidden folder beside the others. Its manifest, with sizes and checksums of all files, is
written last; then the folder is renamed to its tag, and then ``latest`` is replaced. A crash at any moment leaves the
old ``latest`` and what it names, or the new ones.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deepspeed_sdp.checkpoint.json_files import fsync, read_json, write_json
from deepspeed_sdp.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1

_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_tag(tag: str) -> str:
    """``tag`` if it is a plain name.

    Raises:
        CheckpointError: it could lead out of the folder, or hide.
    """
    if not _TAG.fullmatch(tag) or tag == LATEST:
        raise CheckpointError(f"tag: got {tag!r}; takes letters, digits, '.', '_' and '-', and not {LATEST!r}")
    return tag


def begin(folder: Path, tag: str) -> Path:
    """An empty folder to write checkpoint ``tag`` into; what an earlier crash left of unfinished ones is removed."""
    staging = staging_of(folder, check_tag(tag))
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir()
    return staging


def staging_of(folder: Path, tag: str) -> Path:
    """The folder that :func:`begin` made, for the other ranks."""
    return folder / f"{_UNFINISHED}{tag}"


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def finish(folder: Path, tag: str, files: Mapping[str, Mapping[str, Any]], is_latest: bool = True) -> Path:
    """Make what was written under :func:`begin` the checkpoint ``tag``; an older one of that name is replaced.

    Args:
        files: name -> :func:`describe_file` of every file.
    """
    staging, final = staging_of(folder, tag), folder / tag
    body = {"format": FORMAT, "tag": tag, "files": dict(sorted(files.items()))}
    write_json(staging / MANIFEST, {**body, "sha256": _digest(body)})
    fsync(staging)
    if final.exists():
        # Two renames; `recover` knows what a crash between them leaves.
        replaced = folder / f"{_UNFINISHED}{tag}{_REPLACED}"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        staging.rename(final)
    fsync(folder)
    if is_latest:
        set_latest(folder, tag)
    return final


def recover(folder: Path) -> None:
    """After a crash in the middle of replacing the checkpoint that ``latest`` names: take the new one, or the old."""
    tag = latest(folder)
    if tag is None or (folder / tag).exists():
        return
    for hidden in (staging_of(folder, tag), folder / f"{_UNFINISHED}{tag}{_REPLACED}"):
        if (hidden / MANIFEST).is_file():
            try:
                read_manifest(hidden)
            except CheckpointError:
                continue
            hidden.rename(folder / tag)
            fsync(folder)
            return


def set_latest(folder: Path, tag: str) -> None:
    """Let ``latest`` name ``tag``."""
    new = folder / f".{LATEST}.new"
    new.write_text(tag, encoding="utf-8")
    fsync(new)
    os.replace(new, folder / LATEST)
    fsync(folder)


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
    """Complete checkpoints, oldest first."""
    found = [path.parent for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
    return [path.name for path in sorted(found, key=lambda path: (path / MANIFEST).stat().st_mtime_ns)]


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


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint, by name.

    Raises:
        CheckpointError: there is no manifest, it is damaged, or of another format.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint: there is no {checkpoint}{_offer(checkpoint)}")
    manifest = read_json(checkpoint / MANIFEST)
    digest = manifest.pop("sha256", None)
    if digest != _digest(manifest):
        raise CheckpointError(f"checkpoint: {checkpoint / MANIFEST} is damaged{_offer(checkpoint)}")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint: {checkpoint} has format {manifest['format']}; takes {FORMAT}")
    files: dict[str, dict[str, Any]] = manifest["files"]
    return files


def damage(
    checkpoint: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None
) -> dict[str, str]:
    """What is wrong with those of ``names``, by default all files, that differ from the manifest."""
    found = {}
    for name in sorted(files) if names is None else names:
        problem = _difference(checkpoint / name, files[name])
        if problem:
            found[name] = problem
    return found


def _difference(path: Path, written: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        found = describe_file(path)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if found["bytes"] != written["bytes"]:
        return f"{path} has {found['bytes']} bytes; it was written with {written['bytes']}"
    if found["sha256"] != written["sha256"]:
        return f"{path} is damaged: its checksum differs from the manifest's"
    return None


def damaged(checkpoint: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that is not used, with an older one to take instead."""
    return CheckpointError(f"checkpoint: {what}{_offer(checkpoint)}")


def remove_old(folder: Path, keep_last: int, is_kept: Callable[[Path], bool]) -> None:
    """Remove all but the ``keep_last`` newest checkpoints (0: none), what ``latest`` names, and what ``is_kept``."""
    if not keep_last:
        return
    protected = {latest(folder), *tags(folder)[-keep_last:]}
    for tag in tags(folder):
        if tag not in protected and not is_kept(folder / tag):
            # Invisible first, so that a crash leaves no half checkpoint.
            hidden = folder / f"{_UNFINISHED}{tag}.removed"
            (folder / tag).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _offer(checkpoint: Path) -> str:
    others = [tag for tag in tags(checkpoint.parent) if tag != checkpoint.name] if checkpoint.parent.is_dir() else []
    return f"; complete ones there: {', '.join(reversed(others))}" if others else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
