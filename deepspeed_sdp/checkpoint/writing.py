"""Writing a checkpoint: all ranks in parallel, complete or invisible."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.index import INDEX
from deepspeed_sdp.checkpoint.json_files import write_json
from deepspeed_sdp.checkpoint.lock import FolderLocks
from deepspeed_sdp.checkpoint.meta import META, PLAN, STATE
from deepspeed_sdp.checkpoint.planners import EntrySavePlanner
from deepspeed_sdp.checkpoint.region import Entry
from deepspeed_sdp.checkpoint.tensor_files import TensorFileWriter
from deepspeed_sdp.errors import CheckpointError, OutputError, SDPError
from deepspeed_sdp.files import fsync
from deepspeed_sdp.ranks import control_group, gather_objects
from deepspeed_sdp.waits import waiting


def write_checkpoint(
    folder: Path,
    tag: str,
    entries: Sequence[Entry],
    meta: Mapping[str, Any],
    plan_json: str,
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    locks: FolderLocks,
    *,
    group: dist.ProcessGroup | None = None,
    is_latest: bool = True,
    keep_last: int = 0,
    keep_every: int = 0,
) -> None:
    """Collective. Write checkpoint ``tag`` below ``folder``.

    Args:
        entries: this rank's; see :mod:`deepspeed_sdp.checkpoint.planners`.
        meta: JSON data; rank 0's counts.
        plan_json: of the plan; rank 0's counts.
        state: what ``torch.load(weights_only=True)`` can load; rank 0's counts.
        rank_state: the same, of every rank.
        locks: rank 0's count: what it writes nobody else may be writing.
        group: of all ranks; default: the package's own. A thread beside the training has another.
        keep_last: older checkpoints than so many are removed, 0 for none;
        keep_every: but for those whose step is a multiple of this.

    Raises:
        OutputError: something cannot be written, or another job writes into ``folder``; on every rank, and nothing has
            changed for a reader.
        CheckpointError: ``state`` holds what cannot be loaded safely, or entries do not cover the model.
    """
    rank = dist.get_rank()

    def begin() -> dict[str, Any] | None:
        if rank != 0:
            return None
        folders.check_tag(tag)
        locks.take(folder)
        # Its name says which job it is of, and with that of rank 0 all ranks write into one.
        return {"name": folders.begin(folder, tag).name}

    staging = folder / _together(begin, group)[0]["name"]

    def write() -> dict[str, Any]:
        own = {f"rank-{rank:05d}.pt": _pickled(rank_state, "random state")}
        if rank == 0:
            own[STATE] = _pickled(state, "client_state")
            own[PLAN] = plan_json.encode()
        for name, content in own.items():
            (staging / name).write_bytes(content)
            fsync(staging / name)
        if rank == 0:
            write_json(staging / META, dict(meta))
        return {}

    _together(write, group)
    _write_tensors(staging, entries, rank, group)

    def describe() -> dict[str, Any]:
        mine = [*staging.glob(f"tensors-{rank:05d}-*"), staging / f"rank-{rank:05d}.pt"]
        if rank == 0:
            mine += [staging / name for name in (STATE, PLAN, META, INDEX)]
        return {path.name: folders.describe_file(path) for path in mine}

    files = {name: described for of_rank in _together(describe, group) for name, described in of_rank.items()}

    def finish() -> None:
        if rank == 0:
            folders.finish(staging, folder / tag, files, is_latest)
            folders.remove_old(folder, keep_last, keep_every, tag)

    _together(finish, group)


def _write_tensors(staging: Path, entries: Sequence[Entry], rank: int, group: dist.ProcessGroup | None) -> None:
    try:
        with waiting("writing a checkpoint", range(dist.get_world_size())):
            save(
                {},
                storage_writer=TensorFileWriter(staging, rank),
                planner=EntrySavePlanner(entries),
                process_group=group or control_group(),
            )
    except CheckpointException as error:
        failed, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, OSError) or "I/O" in str(reason):
            raise OutputError(f"checkpoint: rank {failed} cannot write {staging}: {reason}") from None
        raise CheckpointError(f"checkpoint: rank {failed}: {reason}") from None


def _pickled(value: Any, what: str) -> bytes:
    """``value`` as a file that loads without running code.

    Raises:
        CheckpointError: it holds something else than tensors, numbers, strings and containers of them.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{what}: cannot be loaded safely ({reason}); takes tensors, numbers, strings, None, and lists, tuples and "
            "dicts of them"
        ) from None
    return buffer.getvalue()


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Collective. Results of ``work`` on all ranks; an error of one of them is raised on all."""
    outcome: tuple[Any, str | None, bool] = (None, None, False)
    try:
        result = work()
        outcome = (result if isinstance(result, dict) else None, None, False)
    except SDPError as error:
        outcome = (None, str(error), isinstance(error, OutputError))
    except OSError as error:
        outcome = (None, f"cannot write the checkpoint: {error}", True)
    except Exception as error:  # the others wait for word of this rank, whatever it is
        outcome = (None, f"{type(error).__name__}: {error}", False)
    outcomes = gather_objects(outcome, "writing a checkpoint", group)
    for rank, (_, message, is_output) in enumerate(outcomes):
        if message is not None:
            raise (OutputError if is_output else CheckpointError)(f"rank {rank}: {message}")
    return [result for result, _, _ in outcomes]
