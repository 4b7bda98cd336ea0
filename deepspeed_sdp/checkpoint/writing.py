"""Writing a checkpoint: all ranks in parallel, complete or invisible."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.lock import FolderLocks
from deepspeed_sdp.checkpoint.meta import META, PLAN, STATE
from deepspeed_sdp.checkpoint.node_copies import copy_to_another_node
from deepspeed_sdp.checkpoint.tensor_files import Snapshot, Streamed
from deepspeed_sdp.errors import CheckpointError, OutputError, SDPError
from deepspeed_sdp.files import fsync
from deepspeed_sdp.ranks import gather_objects

T = TypeVar("T")


def write_checkpoint(
    folder: Path,
    tag: str,
    tensors: Streamed | Snapshot,
    layout: tuple[str, str] | None,
    meta: Mapping[str, Any],
    plan_json: str,
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    locks: FolderLocks,
    *,
    keepers: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    is_latest: bool = True,
    keep_last: int = 0,
    keep_every: int = 0,
) -> None:
    """Collective. Write checkpoint ``tag`` below ``folder``.

    Where every node has a folder of its own, there the files of its ranks lie, those of another node's ranks, and all
    that ranks do not write for themselves. Older checkpoints go when the new one is complete on all nodes.

    Args:
        tensors: content of this rank's file of tensors.
        layout: name and text of its worker's layout, from one rank of every worker.
        meta: JSON data; rank 0's counts.
        plan_json: of the plan; rank 0's counts.
        state: what ``torch.load(weights_only=True)`` can load; rank 0's counts.
        rank_state: the same, of every rank.
        locks: those of keepers count: what they write nobody else may be writing.
        keepers: by rank, the first one that sees the same folder; ``None``: rank 0, of all.
        group: of all ranks; default: the package's own. A thread beside the training has another.
        keep_last: older checkpoints than so many are removed, 0 for none;
        keep_every: but for those whose step is a multiple of this.

    Raises:
        OutputError: something cannot be written, or another job writes into ``folder``; on every rank, and nothing has
            changed for a reader.
        CheckpointError: ``state`` holds what cannot be loaded safely.
    """
    rank = dist.get_rank()
    keeper = keepers[rank] if keepers else 0

    def begin() -> dict[str, Any]:
        if rank != keeper:
            return {}
        folders.check_tag(tag)
        locks.take(folder)
        # Its name says which job it is of, and with that of its keeper all ranks write into one.
        return {"name": folders.begin(folder, tag).name, "mark": folders.new_mark()}

    begun = _together(begin, group)
    staging, mark = folder / begun[keeper]["name"], begun[0]["mark"]

    own, tensor_file = folders.files_of(rank)
    files: dict[str, Any] = {}

    def make() -> dict[str, bytes]:
        content = {} if layout is None else {layout[0]: layout[1].encode()}
        if rank == 0:
            content[STATE] = _pickled(state, "client_state")
            content[PLAN] = plan_json.encode()
            content[META] = json.dumps(meta, indent=1).encode()
        return content

    def write() -> dict[str, Any]:
        files.update(_write(staging, {own: _pickled(rank_state, "random state")}))
        return _write(staging, content if keepers is None or rank == keeper else {})

    if keepers is None:
        content = _agreed(make, group)
    else:
        content = {name: value for of_rank in _together(make, group) for name, value in of_rank.items()}
    described = {name: of for of_rank in _together(write, group) for name, of in of_rank.items()}

    def write_tensors() -> None:
        files[tensor_file] = tensors.write(staging / tensor_file)
        folders.finish_rank(staging, mark, rank, files)

    _together(write_tensors, group)
    if keepers is not None and len(set(keepers)) > 1:
        for name in (own, tensor_file, folders.rank_manifest(rank)):
            copy_to_another_node(staging / name, keepers, group)

    def finish() -> None:
        if rank == keeper:
            manifest = folders.Manifest(mark, dist.get_world_size(), described)
            folders.finish(staging, folder / tag, manifest, is_latest)

    _together(finish, group)
    if rank == keeper:
        folders.remove_old(folder, keep_last, keep_every, tag)


def _write(folder: Path, contents: Mapping[str, bytes]) -> dict[str, Any]:
    """Write files by name, and describe them for a manifest."""
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        fsync(folder / name)
    return {name: folders.describe_file(folder / name) for name in contents}


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


def _together(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Collective. Results of ``work`` on all ranks; an error of one of them is raised on all."""
    return gather_objects(_agreed(work, group), "writing a checkpoint", group)


def _agreed(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Collective. What ``work`` returns; an error of one of the ranks is raised on all."""

    def write() -> T:
        try:
            return work()
        except SDPError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write the checkpoint: {error}") from None
        except Exception as error:
            raise CheckpointError(f"{type(error).__name__}: {error}") from error

    return agreed(write, group=group)
