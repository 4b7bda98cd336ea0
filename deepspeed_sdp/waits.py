"""A wait for other ranks ends at the job's time limit, and says on whom it was."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from deepspeed_sdp.errors import WaitError

_KEY = "deepspeed_sdp/waits"
# Ranks that wait do not begin to at once: how long the first whose time is up listens for the others' words.
_MOST_PATIENCE = 30.0
_PATIENCE_AFTER_A_LOSS = 2.0
_SHOWN = 8
# How gloo, NCCL and torch's store say that somebody did not come, or is gone.
_SIGNS = ("gloo/", "imed out", "imeout", "onnection", "ncclRemoteError", "NCCL communicator was aborted")


def time_limit() -> timedelta:
    """The time limit of the job's collectives: that with which the default process group was made."""
    import torch.distributed as dist

    world: Any = dist.group.WORLD
    # A store that the user made has a limit of its own.
    for device in world._device_types:
        with suppress(RuntimeError, AttributeError):  # torch's fake backend has no options
            limit: timedelta = world._get_backend(device).options._timeout
            return limit
    fallback: timedelta = _store().timeout
    return fallback


def seconds_to_wait() -> float | None:
    """The time limit, for a wait that is no collective; ``None`` where there is no job."""
    dist = sys.modules.get("torch.distributed")
    is_job = dist is not None and dist.is_available() and dist.is_initialized()
    return time_limit().total_seconds() if is_job else None


@contextmanager
def waiting(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Inside, this rank waits for ``ranks``, doing ``what``.

    Raises:
        WaitError: they did not come, or are gone; it names them, and those that do not wait themselves.
    """
    try:
        yield
    except RuntimeError as error:
        raise_if_lost(error, what, ranks)
        raise


def is_loss(error: BaseException) -> bool:
    """Whether it says that other ranks did not come to a collective, or are gone."""
    return isinstance(error, WaitError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def raise_if_lost(error: RuntimeError, what: str, ranks: Sequence[int]) -> None:
    """Say in words what ``error`` of a collective means, if it means that other ranks did not come.

    Raises:
        WaitError: see :func:`waiting`.
    """
    reason = str(error)
    if isinstance(error, WaitError) or not is_loss(error):
        return
    import torch.distributed as dist

    rank = dist.get_rank()
    is_late = "imed out" in reason or "imeout" in reason
    others = [other for other in ranks if other != rank]
    silent = _silent(rank, what, dist.get_world_size(), is_late)
    told = reason.splitlines()[0].rpartition("] ")[2].partition(". This is")[0]
    raise WaitError(
        f"rank {rank} waited for rank(s) {_listed(others)}: {what}: {told}"
        + (f"; rank(s) {_listed(silent)} wait for nobody: they hang, still compute, or are gone" if silent else "")
    ) from error


def _silent(rank: int, what: str, world: int, is_late: bool) -> list[int]:
    """The ranks that do not say within a while that they wait too; none if nobody can be asked."""
    with suppress(Exception):
        store = _store()
        limit = store.timeout
        patience = min(_MOST_PATIENCE, limit.total_seconds() / 2) if is_late else _PATIENCE_AFTER_A_LOSS
        # Rank 0 may be the one that hangs, and the store with it.
        store.set_timeout(timedelta(seconds=max(1.0, patience)))
        try:
            store.set(f"{_KEY}/{rank}", what)
            store.add(_KEY, 1)
            deadline = time.monotonic() + patience
            while store.add(_KEY, 0) < world and time.monotonic() < deadline:
                time.sleep(0.2)
            return _missing(store, range(world))
        finally:
            store.set_timeout(limit)
    return []


def _missing(store: Any, ranks: Sequence[int]) -> list[int]:
    """Those of ``ranks`` that have not said that they wait: few questions, where they are few."""
    if store.check([f"{_KEY}/{rank}" for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return _missing(store, ranks[:half]) + _missing(store, ranks[half:])


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return ", ".join(map(str, ranks[:_SHOWN])) + more


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()
