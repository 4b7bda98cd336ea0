"""One writer per folder of checkpoints: a file that says which job it is.

File locks of the operating system do not reach over every network file system; creating a file that must not exist
does. A job touches its file as long as it lives. So one that is dead is known: on the same host by its process, from
another host by a file that nobody touches.
"""

import json
import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from deepspeed_sdp.checkpoint.json_files import Schema, read_as
from deepspeed_sdp.errors import CheckpointError, OutputError
from deepspeed_sdp.processes import describe, is_running, process_name

LOCK = ".lock"
BEAT_SECONDS = 10.0
# Some beats: one may be late where the file system is.
PATIENCE_SECONDS = 60.0


class _Holder(Schema):
    process: Annotated[str, Field(max_length=400)]


@dataclass
class _Held:
    """What the thread that beats knows: not the object that it lives for."""

    folders: set[Path] = field(default_factory=set)
    end: threading.Event = field(default_factory=threading.Event)
    pid: int = field(default_factory=os.getpid)


class FolderLocks:
    """The folders that this process writes for its job, until :meth:`release`, its end, or that of this object."""

    def __init__(self) -> None:
        self._held = _Held()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, _release, self._held)

    def take(self, folder: Path) -> None:
        """Be the one who writes below ``folder``; once is enough for it and all that is in it.

        A lock of a process that is dead is taken over. Where that cannot be seen from this host, it takes a minute.

        Raises:
            OutputError: another job does; or the folder cannot be written.
        """
        folder = folder.resolve()
        outer = next((held for held in self._held.folders if held == folder or held in folder.parents), folder)
        _take(outer)
        self._held.folders.add(outer)
        if self._thread is None:
            self._held.end.clear()
            self._thread = threading.Thread(target=_beat, args=(self._held,), name="checkpoint lock", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Let others write."""
        _release(self._held)
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def is_taken(folder: Path) -> bool:
    """Whether another job that is alive writes below ``folder``; see :meth:`FolderLocks.take` on how long it takes."""
    path = folder / LOCK
    holder = _holder(path)
    return holder != process_name() and path.exists() and _is_alive(path, holder)


def _take(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        while True:
            # Into the file that was made: by now another's may have its name.
            with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                json.dump({"process": process_name()}, file)
                file.flush()
                os.fsync(file.fileno())
            holder = _holder(path)
            if holder == process_name():
                return
            if not path.exists():
                continue
            if _is_alive(path, holder):
                # By now a job that began at the same moment has written its name.
                other = describe(_holder(path) or "unknown")
                raise OutputError(
                    f"checkpoint: {folder} is written by {other}; takes a folder of its own, "
                    f"or the end of that job (if it is dead, remove {path})"
                )
            # Whoever sees it gone first takes it; the other finds that one's.
            dead = path.with_name(f"{LOCK}.new-{process_name()}")
            with suppress(FileNotFoundError):
                os.rename(path, dead)
                if _holder(dead) != holder:
                    with suppress(FileExistsError):
                        os.link(dead, path)
                dead.unlink()
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write the checkpoint: {error}") from None


def _holder(path: Path) -> str | None:
    try:
        return read_as(path, _Holder).process
    except CheckpointError:  # its writer was killed at once, or is not through yet
        return None


def _is_alive(path: Path, holder: str | None) -> bool:
    running = is_running(holder) if holder is not None else None
    if running is not None:
        return running
    first, deadline = _beats(path), time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        if _holder(path) != holder:
            return path.exists()
        if _beats(path) != first:
            return True
    return False


def _beats(path: Path) -> int | None:
    try:
        # Opened, for a network file system to ask its server.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(held: _Held) -> None:
    while not held.end.wait(BEAT_SECONDS):
        for folder in list(held.folders):
            with suppress(OSError):
                os.utime(folder / LOCK)


def _release(held: _Held) -> None:
    held.end.set()
    if held.pid != os.getpid():
        return
    for folder in held.folders:
        with suppress(OSError):
            if _holder(folder / LOCK) == process_name():
                (folder / LOCK).unlink()
    held.folders.clear()
