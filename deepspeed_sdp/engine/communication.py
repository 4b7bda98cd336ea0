"""Starting DeepSpeed's communication, past the lock of a compilation that was killed."""

import fcntl
import logging
import os
import time
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)

# Ops that DeepSpeed compiles on first use in a job of ours, by the folder torch builds them in.
COMPILED_OPS = ("deepspeed_shm_comm", "fused_adam", "fused_lion", "cpu_adam", "cpu_adagrad", "cpu_lion")


def start_communication(distributed_port: int = 29500, dist_init_required: bool | None = None) -> None:
    """``deepspeed.init_distributed`` with the accelerator's backend.

    On CPU, DeepSpeed loads a compiled op here. torch guards it by a file that a killed process leaves behind, and for
    which every later process waits without end; such a file is removed first.
    """
    if not deepspeed.comm.is_initialized():
        clear_stale_locks()
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )


def clear_stale_locks(patience: float = 300.0) -> list[Path]:
    """Remove locks of compiled ops that no process holds; the removed ones.

    A process of another machine may hold a lock in a shared home folder, which cannot be seen from here: a lock younger
    than ``patience`` seconds is waited for.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    removed = []
    for op in COMPILED_OPS:
        for lock in (*root.glob(f"{op}/lock"), *root.glob(f"*/{op}/lock")):
            # One process at a time decides: else one could remove the lock another has just taken.
            with Path(lock.parent, ".lock-check").open("w") as check:
                fcntl.flock(check, fcntl.LOCK_EX)
                if _abandoned(lock, patience):
                    log.warning("removing %s: the process that made it is gone", lock)
                    lock.unlink(missing_ok=True)
                    removed.append(lock)
    return removed


def _abandoned(lock: Path, patience: float) -> bool:
    told = False
    while True:
        first = _identity(lock)
        if first is None or _held(lock):
            return False
        # torch closes the file a moment before it removes it.
        time.sleep(0.2)
        if _identity(lock) != first or _held(lock):
            continue
        age = time.time() - first[1]
        if age >= patience:
            return True
        if not told:
            told = True
            log.warning("%s: no process of this machine holds it; waiting %.0f s for another's", lock, patience - age)
        time.sleep(1.0)


def _identity(path: Path) -> tuple[int, float] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime


def _held(path: Path) -> bool:
    """Whether a process of this machine has the file open (torch keeps it open while it compiles)."""
    target = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == target:
                return True
        except OSError:
            continue
    return False
