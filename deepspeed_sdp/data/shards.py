"""A source tokenised once into shards: prepared in parallel, continued after an interruption, reused when finished."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed_sdp.data import manifest as manifests
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.preparation import LOCK, PROGRESS, Preparation
from deepspeed_sdp.data.shard_options import ShardOptions, request_of
from deepspeed_sdp.data.source import find_source
from deepspeed_sdp.data.tokenizer import find_tokenizer
from deepspeed_sdp.errors import ConfigError, DataError, OutputError


def prepare_shards(
    folder: Path, options: ShardOptions, *, workers: int | None = None, overwrite: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Make ``folder``, go on with it, or find it finished. Returns its manifest.

    The files do not depend on ``workers`` (default: one per core), nor on interruptions. Until it is finished
    everything lies in ``.NAME.partial`` beside it.

    Raises:
        DataError: unusable source or tokenizer, or a fault at which the policy is to stop.
        OutputError: ``folder`` cannot be written, holds something else, or other shards and not ``overwrite``.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"--workers: got {workers}; takes a number from 1 on")
    folder = folder.resolve()
    skipped = Skipped()
    source = find_source(options.source, skipped)
    tokenizer = None if options.tokenizer is None else find_tokenizer(options.tokenizer)
    request = request_of(options, source, tokenizer)
    try:
        found = _finished(folder, request, overwrite)
        if found is not None:
            return found
        staging = folder.with_name(f".{folder.name}.partial")
        staging.mkdir(parents=True, exist_ok=True)
        with _lock(staging):
            _put_back(folder)
            # What was put back is replaced only where that was asked for.
            found = _finished(folder, request, overwrite)
            if found is not None:
                return found
            if not _is_made(staging, request):
                Preparation(staging, options, source, tokenizer, request, skipped, progress).run(workers)
            _publish(staging, folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return manifests.read_manifest(folder)


def _finished(folder: Path, request: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = manifests.read_manifest(folder)
    except DataError as error:
        if not (folder / manifests.NAME).is_file():
            raise OutputError(f"{folder}: holds something else than shards; takes a new folder") from None
        if overwrite:
            return None
        raise OutputError(f"{error}; --overwrite makes it anew") from None
    if manifest["fingerprint"] == manifests.fingerprint(request) and not overwrite:
        manifests.check_sizes(folder, manifest)
        return manifest
    if overwrite:
        return None
    other = [key for key, value in request.items() if manifest["request"].get(key) != value]
    raise OutputError(
        f"{folder}: holds shards made of something else (another {', '.join(other)}); takes another folder, or "
        "--overwrite"
    )


@contextlib.contextmanager
def _lock(staging: Path) -> Iterator[None]:
    with (staging / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{staging}: another process is preparing these shards") from None
        yield


def _publish(staging: Path, folder: Path) -> None:
    if folder.exists():
        # Made by an earlier preparation, and to be overwritten; anything else was refused.
        known = {file["name"].split("/")[0] for file in _files_of(folder)} | {manifests.NAME}
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
        if foreign:
            raise OutputError(f"{folder}: holds other files too ({foreign[0]}); move them before --overwrite")
    for name in (PROGRESS, LOCK):
        (staging / name).unlink(missing_ok=True)
    # Whatever instant this is killed at, the old shards or the new ones are whole.
    if folder.exists():
        os.replace(folder, _aside(folder))
    os.replace(staging, folder)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _put_back(folder: Path) -> None:
    """Shards that a process killed between two renames left aside; those it has replaced are removed."""
    aside = _aside(folder)
    if aside.exists() and not folder.exists():
        os.replace(aside, folder)
    elif aside.exists():
        shutil.rmtree(aside)


def _is_made(staging: Path, request: dict[str, Any]) -> bool:
    """Whether only the renaming is missing."""
    try:
        manifest = manifests.read_manifest(staging)
        manifests.check_sizes(staging, manifest)
    except DataError:
        return False
    return bool(manifest["fingerprint"] == manifests.fingerprint(request))


def _files_of(folder: Path) -> list[dict[str, Any]]:
    try:
        files: list[dict[str, Any]] = json.loads((folder / manifests.NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return files
