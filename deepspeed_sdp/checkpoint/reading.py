"""Reading a checkpoint: verified before it is used, into any layout."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.hf_folder import HFFolderReader, is_hf_folder
from deepspeed_sdp.checkpoint.json_files import Schema, check
from deepspeed_sdp.checkpoint.meta import STATE
from deepspeed_sdp.checkpoint.planners import EntryLoadPlanner
from deepspeed_sdp.checkpoint.recovery import do_without
from deepspeed_sdp.checkpoint.region import Entry
from deepspeed_sdp.checkpoint.tensor_files import TensorFileReader
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.ranks import control_group, gather_objects, meet
from deepspeed_sdp.waits import waiting


class _Scaler(Schema):
    name: Annotated[str, Field(alias="class")]
    state: dict[str, Any]


class _State(Schema):
    client_state: dict[Any, Any]
    optimizer_groups: list[dict[str, Any]]
    optimizer_scalars: list[dict[str, Any]] | dict[str, Any]
    lr_scheduler: dict[str, Any] | None
    loss_scaler: _Scaler


class _RankState(Schema):
    random: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        meta: JSON data of the job that wrote it; empty for a HuggingFace folder.
        reader: of its files.
        damage: of files that it can do without, by name.
    """

    path: Path
    meta: dict[str, Any]
    reader: type[TensorFileReader] = TensorFileReader
    damage: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_weights_only(self) -> bool:
        """Whether it is a model, with no state of a training."""
        return not self.meta

    def state(self) -> dict[str, Any]:
        """What the job saved beside its tensors."""
        return {"client_state": {}} if self.has_weights_only else self._load(STATE, _State)

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """What rank ``rank`` of the job saved for itself; ``None`` if the file is lost."""
        name = f"rank-{rank:05d}.pt"
        return None if name in self.damage else self._load(name, _RankState)

    def read(self, entries: Sequence[Entry]) -> None:
        """Collective. Fill the tensors of ``entries``.

        Raises:
            CheckpointError: something is missing, or has another shape; on every rank.
        """
        reader = self.reader(self.path, self.damage)
        problem = None
        try:
            # Some versions of torch swallow what goes wrong here.
            reader.read_metadata()
        except CheckpointError as error:
            problem = str(error)
        _raise_everywhere(problem)
        try:
            with waiting("reading a checkpoint", range(dist.get_world_size())):
                load({}, storage_reader=reader, planner=EntryLoadPlanner(entries), process_group=control_group())
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"rank {rank}: {reason}") from None

    def _load(self, name: str, kind: type[Schema]) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"checkpoint: {self.path / name} is refused: {str(error).splitlines()[0]}") from None
        check(loaded, kind, str(self.path / name))
        return loaded


def open_checkpoint(folder: Path, tag: str | None) -> Checkpoint | None:
    """Collective. The checkpoint ``tag`` below ``folder``, or the latest; ``None`` where nothing was saved.

    Every rank compares its share of the files with the manifest; it does without files of which other owners wrote
    copies. A HuggingFace folder counts as a checkpoint of weights alone.

    Raises:
        CheckpointError: it is missing or damaged; on every rank, naming the file and complete checkpoints beside it.
    """
    # A folder of HuggingFace's Trainer is both.
    if tag is None and is_hf_folder(folder) and not (folder / folders.LATEST).is_file():
        return Checkpoint(folder, {}, HFFolderReader)
    rank, world = dist.get_rank(), dist.get_world_size()
    problem, found, mine = None, None, {}
    if rank == 0 and folder.is_dir():
        with suppress(OSError, CheckpointError):  # a folder that cannot be written can still be read
            folders.recover(folder)
    meet("repairing a folder of checkpoints")
    try:
        found = folders.check_tag(tag) if tag is not None else folders.latest(folder)
        if found is not None:
            checkpoint = folder / found
            files = folders.read_manifest(checkpoint)
            mine = folders.damage(checkpoint, files, sorted(files)[rank::world])
    except CheckpointError as error:
        problem = str(error)
    outcomes = gather_objects((found, problem, mine), "verifying a checkpoint")
    for _, message, _ in outcomes:
        if message is not None:
            raise CheckpointError(message)
    if len({name for name, _, _ in outcomes}) > 1:
        raise CheckpointError(f"checkpoint: ranks see different checkpoints below {folder}; takes a shared folder")
    if found is None:
        return None
    damage = {name: what for _, _, of_rank in outcomes for name, what in sorted(of_rank.items())}
    meta: dict[str, Any] = {}
    try:
        _, meta = do_without(checkpoint, files, damage)
    except CheckpointError as error:
        problem = str(error)
    _raise_everywhere(problem)
    return Checkpoint(checkpoint, meta, damage=damage)


def _raise_everywhere(problem: str | None) -> None:
    """Collective. Raise what one of the ranks has found on all."""
    for message in filter(None, gather_objects(problem, "reading a checkpoint")):
        raise CheckpointError(message)
