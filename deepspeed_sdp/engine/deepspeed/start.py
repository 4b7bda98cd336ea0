"""Starting DeepSpeed's communication, past the lock of a compilation that was killed."""

import fcntl
import functools
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from deepspeed_sdp.config import more_ranks
from deepspeed_sdp.errors import ConfigError

_SECONDS_BETWEEN_LOOKS = 10.0

log = logging.getLogger(__name__)

# Ops that DeepSpeed compiles on first use in a job of ours, by the folder torch builds them in.
COMPILED_OPS = ("deepspeed_shm_comm", "fused_adam", "fused_lion", "cpu_adam", "cpu_adagrad", "cpu_lion")

# What DeepSpeed takes a rank's place from; launchers set them.
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How many processes MPI (Open MPI, MPICH and Intel's, MVAPICH) or srun started; DeepSpeed asks MPI for the rest.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# Platforms whose variables DeepSpeed knows.
_PLATFORMS = ("AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV", "DLTS_JOB_ID")

# NCCL's switch for one order of all communicators on a device: that in which the host launches. It is read when NCCL
# starts.
ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
_ORDERED_NCCL = (2, 26)


def start_communication(distributed_port: int = 29500, dist_init_required: bool | None = None) -> None:
    """``deepspeed.init_distributed`` with the accelerator's backend, on the device of this process.

    On CPU, DeepSpeed loads a compiled op here. torch guards it by a file that a killed process leaves behind, and for
    which every other process waits without end; such a file is removed, before and meanwhile. A process that nothing
    launched is a world of one.

    Raises:
        ConfigError: see :func:`take_a_place` and :func:`order_communicators`.
    """
    if not deepspeed.comm.is_initialized():
        take_a_place()
        clear_stale_locks()
        _say_if_it_compiles()
    order_communicators()
    _take_device()
    with _clearing_locks():
        deepspeed.init_distributed(
            get_accelerator().communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
        )
    # MPI says only now which place this process has.
    _take_device()


def _take_device() -> None:
    """The device that DeepSpeed's engine will take, before anything is sent: NCCL takes one process per device."""
    if "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def order_communicators() -> None:
    """Have NCCL run what this process launches on several communicators in the order of its launches.

    Kernels of two communicators that start in different orders on two devices can wait for each other for ever.
    A user's own setting stays.

    Raises:
        ConfigError: NCCL is too old to do so, and the user has not set it to 0.
    """
    is_late = torch.distributed.is_initialized()
    backend = torch.distributed.get_backend_config() if is_late else get_accelerator().communication_backend_name()
    if "nccl" not in backend or os.environ.get(ORDER) == "0":
        return
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    if version < _ORDERED_NCCL:
        raise ConfigError(
            f"NCCL: got {'.'.join(map(str, version))}; takes {'.'.join(map(str, _ORDERED_NCCL))} or newer, which keeps "
            f"several communicators in one order; set {ORDER}=0 to run without that"
        )
    if ORDER not in os.environ:
        os.environ[ORDER] = "1"
        if is_late:
            log.warning("NCCL has been started without %s=1, which may come too late now; set it for the job", ORDER)


def _say_if_it_compiles() -> None:
    """Nothing else is seen meanwhile."""
    is_built = any(_build_root().glob("**/deepspeed_shm_comm/*.so"))
    if get_accelerator().device_name() == "cpu" and not is_built and os.environ.get("RANK", "0") == "0":
        log.warning(
            "DeepSpeed compiles its op for CPU ranks (deepspeed_shm_comm), once: it takes minutes on a slow CPU"
        )


@contextmanager
def _clearing_locks() -> Iterator[None]:
    """Inside, this process may wait for one that compiles: for as long as that one lives."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            clear_stale_locks()

    threading.Thread(target=watch, name="compile locks", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def take_a_place() -> None:
    """Make a process that no launcher started a world of one, by the variables that a launcher would have set.

    Raises:
        ConfigError: something started several processes that DeepSpeed cannot tell from each other.
    """
    missing = [name for name in _PLACE if name not in os.environ]
    if not missing or any(name in os.environ for name in _PLATFORMS):
        return
    several = [name for name in (*_COUNTS, "WORLD_SIZE", "RANK") if _number(name) > (name != "RANK")]
    if not several:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = ("0", "0", "1", "127.0.0.1", str(port))
        os.environ.update({name: value for name, value in zip(_PLACE, values, strict=True) if name in missing})
    elif importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            f"environment: got {several[0]}={os.environ[several[0]]} without {', '.join(missing)}; takes them as "
            "deepspeed and torchrun set them for every process, or the package mpi4py, which asks MPI for them"
        )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


@functools.cache
def say_world_of_one() -> None:
    """Once, to whoever forgot the launcher."""
    log.warning("a world of one rank trains the whole model, without partners; start several with %s", more_ranks("N"))


def clear_stale_locks(patience: float = 300.0) -> list[Path]:
    """Remove locks of compiled ops that no process holds; the removed ones.

    A process of another machine may hold a lock in a shared home folder, which cannot be seen from here: a lock younger
    than ``patience`` seconds is waited for.
    """
    root = _build_root()
    removed = []
    for op in COMPILED_OPS:
        for lock in (*root.glob(f"{op}/lock"), *root.glob(f"*/{op}/lock")):
            # One process at a time decides: else one could remove the lock another has just taken.
            with Path(lock.parent, ".lock-check").open("w") as check:
                if not _lock(check, patience + _SECONDS_BETWEEN_LOOKS):
                    log.warning("%s: another process has looked at it for long; it is left to that one", lock)
                elif _abandoned(lock, patience):
                    log.warning("removing %s: the process that made it is gone", lock)
                    lock.unlink(missing_ok=True)
                    removed.append(lock)
    return removed


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _lock(file: IO[str], seconds: float) -> bool:
    """Whether ``file`` could be locked within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


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
        with suppress(OSError):
            if os.readlink(link) == target:
                return True
    return False
