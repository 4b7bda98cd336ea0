"""Reading a checkpoint: verified before it is used, into any layout."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.hf_folder import HFFolderReader, is_hf_folder
from deepspeed_sdp.checkpoint.planners import EntryLoadPlanner
from deepspeed_sdp.checkpoint.region import Entry
from deepspeed_sdp.checkpoint.tensor_files import TensorFileReader, read_json
from deepspeed_sdp.checkpoint.writing import META, STATE
from deepspeed_sdp.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        meta: JSON data of the job that wrote it; empty for a HuggingFace folder.
        reader: of its files.
    """

    path: Path
    meta: dict[str, Any]
    reader: type[TensorFileReader] = TensorFileReader

    @property
    def has_weights_only(self) -> bool:
        """Whether it is a model, with no state of a training."""
        return not self.meta

    def state(self) -> dict[str, Any]:
        """What the job saved beside its tensors."""
        return {"client_state": {}} if self.has_weights_only else self._load(STATE)

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What rank ``rank`` of the job saved for itself."""
        return self._load(f"rank-{rank:05d}.pt")

    def read(self, entries: Sequence[Entry], group: dist.ProcessGroup | None = None) -> None:
        """Collective. Fill the tensors of ``entries``.

        Raises:
            CheckpointError: something is missing, or has another shape; on every rank.
        """
        try:
            load({}, storage_reader=self.reader(self.path), planner=EntryLoadPlanner(entries), process_group=group)
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"rank {rank}: {reason}") from None

    def _load(self, name: str) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"checkpoint: {self.path / name} is refused: {str(error).splitlines()[0]}") from None
        return loaded


def open_checkpoint(folder: Path, tag: str | None, group: dist.ProcessGroup | None = None) -> Checkpoint | None:
    """Collective. The checkpoint ``tag`` below ``folder``, or the latest; ``None`` where nothing was saved.

    Every rank compares its share of the files with the manifest. A HuggingFace folder counts as a checkpoint of weights
    alone.

    Raises:
        CheckpointError: it is missing or damaged; on every rank, naming the file and complete checkpoints beside it.
    """
    if tag is None and is_hf_folder(folder):
        return Checkpoint(folder, {}, HFFolderReader)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    problem, found = None, None
    if rank == 0 and folder.is_dir():
        with suppress(OSError, CheckpointError):  # a folder that cannot be written can still be read
            folders.recover(folder)
    dist.barrier(group)
    try:
        found = folders.check_tag(tag) if tag is not None else folders.latest(folder)
        if found is not None:
            checkpoint = folder / found
            files = folders.read_manifest(checkpoint)
            problem = folders.damage(checkpoint, files, sorted(files)[rank::world])
            if problem:
                problem = str(folders.damaged(checkpoint, problem))
    except CheckpointError as error:
        problem = str(error)
    outcomes: list[Any] = [None] * world
    dist.all_gather_object(outcomes, (found, problem), group=group)
    for _, message in outcomes:
        if message is not None:
            raise CheckpointError(message)
    if len({name for name, _ in outcomes}) > 1:
        raise CheckpointError(f"checkpoint: ranks see different checkpoints below {folder}; takes a shared folder")
    if found is None:
        return None
    return Checkpoint(folder / found, read_json(folder / found / META))
