"""HuggingFace folders that are written: never with files of two models, whenever the process is killed.

Who loads them knows nothing of this package, and reads a config and any number of files of weights one by one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed_sdp.files import begin_folder, fsync, replace_folder, share

_CONFIG = "config.json"
# Those of an earlier model that the new one does not have would be loaded with it, or instead of it.
_OF_A_MODEL = ("model*.safetensors*", "pytorch_model*.bin*", "generation_config.json")


@contextmanager
def model_folder(out: Path) -> Iterator[Path]:
    """An empty folder to write a model into, whose files then replace those of the model in ``out``; others stay.

    They are put into a copy of ``out`` that takes its place in one step. That cannot be where ``out`` has folders in it
    or is a mount point: then ``out`` has no config, and does not load, while its files are replaced.

    Raises:
        OSError: it cannot be written; an earlier model is still there, but for a disk that fails in between.
    """
    out = out.resolve()
    is_copied = _can_be_moved(out)
    staged = begin_folder(out if is_copied else out / "model")
    try:
        yield staged
        share(staged)
        for file in staged.iterdir():
            fsync(file)
        if is_copied:
            _take_along(out, staged)
            replace_folder(staged, out)
        else:
            _fill(out, staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _can_be_moved(out: Path) -> bool:
    if not out.exists():
        return True
    parts = list(out.iterdir())
    return not (
        any(part.is_dir() for part in parts)
        or os.path.ismount(out)
        or not os.access(out.parent, os.W_OK)
        # The shell that it was started from would be left in a folder that is gone.
        or Path.cwd() == out
    )


def _take_along(out: Path, staged: Path) -> None:
    if not out.exists():
        return
    old = {_CONFIG, *(path.name for pattern in _OF_A_MODEL for path in out.glob(pattern))}
    for path in out.iterdir():
        target = staged / path.name
        if path.name in old or target.exists():
            continue
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, target, follow_symlinks=False)
    shutil.copymode(out, staged)


def _fill(out: Path, staged: Path) -> None:
    new = {path.name for path in staged.iterdir()}
    (out / _CONFIG).unlink(missing_ok=True)
    fsync(out)
    for pattern in _OF_A_MODEL:
        for path in out.glob(pattern):
            path.unlink()
    for name in sorted(new - {_CONFIG}):
        os.replace(staged / name, out / name)
    fsync(out)
    if _CONFIG in new:
        os.replace(staged / _CONFIG, out / _CONFIG)
    fsync(out)
