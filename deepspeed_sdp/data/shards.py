"""A source tokenised once into shards: prepared in parallel, continued after an interruption, reused when finished."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from deepspeed_sdp.data import manifest as manifests
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.preparation import LOCK, PROGRESS, Preparation
from deepspeed_sdp.data.shard_options import ShardOptions, request_of
from deepspeed_sdp.data.source import find_source
from deepspeed_sdp.data.tokenizer import find_tokenizer
from deepspeed_sdp.errors import ConfigError, DataError, OutputError
from deepspeed_sdp.files import recover_folder, replace_folder

Overwrite = Literal["never", "outdated", "always"]

# What there is in a folder of shards.
_OWN = re.compile(
    rf"(train|heldout)-(\d+\.bin|documents\.idx)|{manifests.TOKENIZER}|{manifests.NAME}|{PROGRESS}|{LOCK}"
)


def prepare_shards(
    folder: Path,
    options: ShardOptions,
    *,
    workers: int | None = None,
    overwrite: Overwrite = "never",
    progress: bool = False,
) -> dict[str, Any]:
    """Make ``folder``, go on with it, or find it finished. Returns its manifest.

    The files do not depend on ``workers`` (default: one per core), nor on interruptions. Until it is finished
    everything lies in ``.NAME.partial`` beside it.

    Args:
        overwrite: which finished shards in ``folder`` are made anew; ``outdated``: those that were made of something
            else, or are damaged.

    Raises:
        DataError: unusable source or tokenizer, or a fault at which the policy is to stop.
        OutputError: ``folder`` cannot be written, or holds what is not to be overwritten.
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
        staging = folder.with_name(f".{folder.name}.partial")
        found = _finished(folder, request, overwrite)
        if found is not None:
            if staging.exists():
                with contextlib.suppress(OSError), _lock(staging):
                    _remove_replaced(staging, folder)
            return found
        staging.mkdir(parents=True, exist_ok=True)
        with _lock(staging):
            recover_folder(folder)
            # What was put back is replaced only where that was asked for.
            found = _finished(folder, request, overwrite)
            if found is not None:
                _remove_replaced(staging, folder)
                return found
            _check_replaceable(folder)
            if not _is_made(staging, request):
                Preparation(staging, options, source, tokenizer, request, skipped, progress).run(workers)
            _publish(staging, folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return manifests.read_manifest(folder)


def _finished(folder: Path, request: dict[str, Any], overwrite: Overwrite) -> dict[str, Any] | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / manifests.NAME).is_file():
        raise OutputError(f"{folder}: holds something else than shards; takes a new folder")
    if overwrite == "always":
        return None
    try:
        manifest = manifests.read_manifest(folder)
        is_the_same = manifest["fingerprint"] == manifests.fingerprint(request)
        if is_the_same:
            manifests.check_files(folder, manifest)
    except DataError as error:
        if overwrite == "outdated":
            return None
        raise OutputError(f"{error}; --overwrite makes it anew") from None
    if is_the_same:
        return manifest
    if overwrite == "outdated":
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


def _check_replaceable(folder: Path) -> None:
    """Made by an earlier preparation, it is, and nothing that somebody put there."""
    foreign = sorted(e.name for e in folder.iterdir() if not _OWN.fullmatch(e.name)) if folder.exists() else ()
    if foreign:
        raise OutputError(f"{folder}: holds other files too ({foreign[0]}); move them, or take another folder")


def _publish(staging: Path, folder: Path) -> None:
    _check_replaceable(folder)
    for name in (PROGRESS, LOCK):
        (staging / name).unlink(missing_ok=True)
    replace_folder(staging, folder)


def _remove_replaced(staging: Path, folder: Path) -> None:
    """What a process left that was killed when it had put ``folder`` in place; not work to go on with."""
    manifest = staging / manifests.NAME
    is_newer = manifest.exists() and manifest.stat().st_mtime_ns > (folder / manifests.NAME).stat().st_mtime_ns
    if not is_newer and not (staging / PROGRESS).exists():
        shutil.rmtree(staging)


def _is_made(staging: Path, request: dict[str, Any]) -> bool:
    """Whether only the renaming is missing."""
    try:
        manifest = manifests.read_manifest(staging)
        manifests.check_files(staging, manifest)
    except DataError:
        return False
    return bool(manifest["fingerprint"] == manifests.fingerprint(request))
