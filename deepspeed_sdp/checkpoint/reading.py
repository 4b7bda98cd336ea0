"""Reading a checkpoint: verified before it is used, into any layout."""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.hf_folder import HFFolder, is_hf_folder
from deepspeed_sdp.checkpoint.json_files import Count, Schema, check
from deepspeed_sdp.checkpoint.meta import STATE
from deepspeed_sdp.checkpoint.recovery import check_all, check_sizes, meta_of
from deepspeed_sdp.checkpoint.runs import Entry
from deepspeed_sdp.checkpoint.source import Source
from deepspeed_sdp.checkpoint.tensor_files import TensorFiles
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.ranks import gather_objects, meet

T = TypeVar("T")


class _Scaler(Schema):
    name: Annotated[str, Field(alias="class")]
    state: dict[str, bool | int | float | str | None]


class _Scalar(Schema):
    value: bool | int | float
    dtype: str | None


class _State(Schema):
    client_state: dict[Any, Any]
    optimizer_groups: list[dict[str, Any]]
    optimizer_scalars: list[dict[str, _Scalar]] | dict[str, _Scalar]
    lr_scheduler: dict[str, Any] | None
    loss_scaler: _Scaler


class _Apart(Schema):
    agreed_at: Count
    is_agreeing: bool
    inner: dict[str, Any]
    outer: list[dict[str, Any]]


class _RankState(Schema):
    random: dict[str, Any]
    apart: _Apart | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        meta: JSON data of the job that wrote it; empty for a HuggingFace folder.
        source: of its tensors.
        damage: of files that it can do without, by name.
        elsewhere: names of files that this rank cannot see.
    """

    path: Path
    meta: dict[str, Any]
    source: Source
    damage: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Container[str] = ()

    @property
    def has_weights_only(self) -> bool:
        """Whether it is a model, with no state of a training."""
        return not self.meta

    def state(self) -> dict[str, Any]:
        """What the job saved beside its tensors."""
        return {"client_state": {}} if self.has_weights_only else load_state(self.path)

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """What rank ``rank`` of the job saved for itself; ``None`` if the file is lost, or elsewhere."""
        name, _ = folders.files_of(rank)
        return None if name in self.damage or name in self.elsewhere else _load(self.path / name, _RankState)

    def read(self, entries: Sequence[Entry]) -> None:
        """Collective. Fill the tensors of ``entries``.

        Raises:
            CheckpointError: something is missing, or has another shape; on every rank.
        """
        _together(lambda: self.source.fill(entries))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What a job saved beside its tensors.

    Raises:
        CheckpointError: it is no such thing, or cannot be loaded safely.
    """
    return _load(checkpoint / STATE, _State)


def _load(path: Path, kind: type[Schema]) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint: {path} is refused: {str(error).splitlines()[0]}") from None
    check(loaded, kind, str(path))
    return loaded


def open_checkpoint(folder: Path, tag: str | None, worker: int = 0) -> Checkpoint | None:
    """Collective. The checkpoint ``tag`` below ``folder``, or the latest; ``None`` where nothing was saved.

    Every rank compares its share of the files with the manifests; it does without files of which other owners wrote
    copies. A HuggingFace folder counts as a checkpoint of weights alone.

    Args:
        worker: whose layout this rank probably needs.

    Raises:
        CheckpointError: it is missing or damaged; on every rank, naming the file and complete checkpoints beside it.
    """
    # A folder of HuggingFace's Trainer is both.
    if tag is None and is_hf_folder(folder) and not (folder / folders.LATEST).is_file():
        return Checkpoint(folder, {}, _together(lambda: HFFolder(folder)))
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0 and folder.is_dir():
        with suppress(OSError, CheckpointError):  # a folder that cannot be written can still be read
            folders.recover(folder)
    meet("repairing a folder of checkpoints")

    def verify() -> tuple[str | None, folders.Manifest | None, dict[str, str]]:
        found = folders.check_tag(tag) if tag is not None else folders.latest(folder)
        if found is None:
            return None, None, {}
        manifest = folders.read_manifest(folder / found)
        return found, manifest, folders.damage(folder / found, manifest, rank, world)

    found, manifest, mine = _together(verify)
    outcomes = gather_objects((found, mine), "verifying a checkpoint")
    if len({name for name, _ in outcomes}) > 1:
        raise CheckpointError(f"checkpoint: ranks see different checkpoints below {folder}; takes a shared folder")
    if found is None or manifest is None:
        return None
    checkpoint = folder / found
    damage = {name: of_rank[name] for _, of_rank in outcomes for name in sorted(of_rank)}

    def look() -> Checkpoint:
        meta = meta_of(checkpoint, manifest, damage)
        files = TensorFiles(checkpoint, meta["workers"], damage, worker)
        if rank == 0:
            check_all(files, checkpoint, meta, damage)
        check_sizes(files, checkpoint, manifest, range(rank, manifest.ranks, world))
        return Checkpoint(checkpoint, meta, files, damage)

    return _together(look)


def _together(work: Callable[[], T]) -> T:
    """Collective. What ``work`` returns; an error of one of the ranks is raised on all."""

    def read() -> T:
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{type(error).__name__}: {error}") from error

    return agreed(read)
