"""Files and folders that are replaced whole: whenever the process is killed, the old or the new one is there.

What is new is written under a hidden name beside what it replaces, with the name of this process in it. So nobody takes
it for finished, two processes do not share it, and the next who writes the same can tell what a dead one has left.
"""

import ctypes
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from deepspeed_sdp.processes import is_running, process_name

_NEW = ".new-"
_OLD = ".replaced-sdp"
# What is hidden, and the process that writes it; a file keeps its suffix.
_NAME_OF_NEW = re.compile(r"\..+\.new-(?P<owner>.+@\d+-\d+-\d+)(\.\w+)?")
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_AT_FDCWD = -100
# What a process that cannot be seen from here left for so long is not written any more.
_ABANDONED_SECONDS = 24 * 3600.0


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Give a file, or all that is in a folder, the modes of new ones; some libraries write for the user alone."""
    mask = _umask()
    for found in (path, *(path.rglob("*") if path.is_dir() else ())):
        if not found.is_symlink():
            # A folder hands its group on, where that is set.
            kept = stat.S_ISGID & found.stat().st_mode if found.is_dir() else 0
            found.chmod((0o777 if found.is_dir() else 0o666) & ~mask | kept)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, with the suffix of ``path``; it takes that file's place where nothing is raised.

    Raises:
        OSError: it cannot be written.
    """
    head, tail = f".{path.stem}{_NEW}", path.suffix
    _remove_abandoned(path.parent, head, tail)
    new = path.with_name(f"{head}{process_name()}{tail}")
    try:
        yield new
        share(new)
        fsync(new)
        os.replace(new, path)
        fsync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def staged_folder(final: Path, owner: str | None = None) -> Path:
    """The path beside ``final`` under which ``owner``, by default this process, writes what will replace it."""
    return final.with_name(f".{final.name}{_NEW}{owner or process_name()}")


def begin_folder(final: Path) -> Path:
    """Make :func:`staged_folder`, empty; what earlier attempts left is put in order first.

    Raises:
        OSError: it cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(final)
    _remove_abandoned(final.parent, f".{final.name}{_NEW}")
    staged = staged_folder(final)
    staged.mkdir()
    return staged


def replace_folder(staged: Path, final: Path) -> None:
    """Let ``staged``, on the same file system, take the place of ``final``, which is removed if it is there.

    One system call, where the file system can exchange two folders. Where it cannot (NFS), two renames, between which
    ``final`` is missing; :func:`recover_folder` puts the old one back.

    Raises:
        OSError: it cannot be done, or ``final`` is no folder; it is what it was.
    """
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final))
    fsync(staged)
    if not final.exists():
        os.rename(staged, final)
        fsync(final.parent)
        _remove(_aside(final))
    elif _exchange(staged, final):
        fsync(final.parent)
        with suppress(OSError):
            _remove(staged)  # a link to a folder, where ``final`` was one
    else:
        aside = _aside(final)
        _remove(aside)
        os.rename(final, aside)
        try:
            os.rename(staged, final)
        except OSError:
            os.rename(aside, final)
            raise
        fsync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Put right what :func:`replace_folder` left behind when it was killed; not while another replaces ``final``.

    Raises:
        OSError: it cannot be done.
    """
    aside = _aside(final)
    if final.exists():
        _remove(aside)
    elif aside.exists():
        os.rename(aside, final)
        fsync(final.parent)


def interrupted(folder: Path) -> list[Path]:
    """The folders below ``folder`` that are missing, for :func:`recover_folder` to put back."""
    names = [path.name[1 : -len(_OLD)] for path in folder.glob(f".*{_OLD}")]
    return [folder / name for name in names if not (folder / name).exists()]


def remove_folder(folder: Path) -> None:
    """Remove a folder; whoever looks sees all of it or nothing.

    Raises:
        OSError: it cannot be removed.
    """
    hidden = staged_folder(folder)
    _remove(hidden)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Put right whatever of this module is unfinished below ``folder``, but for what processes of this host are about.

    For who knows that nobody on other hosts writes there.

    Raises:
        OSError: it cannot be removed.
    """
    for final in interrupted(folder):
        recover_folder(final)
    for left in folder.glob(f".*{_OLD}"):
        _remove(left)
    for left in folder.glob(f".*{_NEW}*"):
        owner = _owner(left)
        if owner is not None and (owner == process_name() or not is_running(owner)):
            _remove(left)


def _owner(left: Path) -> str | None:
    found = _NAME_OF_NEW.fullmatch(left.name)
    return found["owner"] if found else None


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}{_OLD}")


def _remove_abandoned(folder: Path, head: str, tail: str = "") -> None:
    """Remove what processes that are dead, or this one, began under such names."""
    for left in folder.glob(f"{escape(head)}*{escape(tail)}"):
        owner = _owner(left)
        if owner is None:
            continue
        with suppress(FileNotFoundError):
            running = is_running(owner)
            if running is None and time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                running = False
            if running is False or owner == process_name():
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; ``False`` where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _umask() -> int:
    """Asking ``os.umask`` would change it for a moment, in all threads."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
