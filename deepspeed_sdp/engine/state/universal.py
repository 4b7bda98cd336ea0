"""A checkpoint of DeepSpeed's universal format as one that SDP takes up.

``python -m deepspeed.checkpoint.ds_to_universal`` makes one out of what a dense DeepSpeed job saved, at any ZeRO stage.
Its files are pickles: they are loaded with ``weights_only=True``, which runs nothing that they say.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from deepspeed_sdp.agreement import agree
from deepspeed_sdp.checkpoint import Checkpoint, Read, Run, Source, is_complete, whole
from deepspeed_sdp.errors import CheckpointError

LATEST = "latest_universal"


# Plain data; the names are DeepSpeed's.
def _stage(enum: Any, name: str) -> ZeroStageEnum:
    """What ``getattr`` is in a pickle of Python 3.11.0 to 3.11.3, which wrote members of enumerations by name."""
    if enum is not ZeroStageEnum:
        raise TypeError(f"takes a member of ZeroStageEnum, got {name!r} of {enum!r}")
    return ZeroStageEnum[name]


SAFE: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, (_stage, "builtins.getattr")]


# What DeepSpeed itself writes beside the client's state.
_OF_DEEPSPEED = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info",
}  # fmt: skip


@dataclass(frozen=True)
class UniversalCheckpoint(Checkpoint):
    """What a dense DeepSpeed job saved, in SDP's terms; made by :func:`open_universal`.

    Attributes:
        job: what the job saved beside its optimizer.
        optimizer: what all parameters share of the optimizer.
    """

    job: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        scaler = self.optimizer.get("loss_scaler")
        inner = self.optimizer.get("optimizer_state_dict", {}).get("state", {}).get(0, {})
        steps = inner["step"] if "step" in inner else _first_step(self.path)
        scalars = {} if steps is None else {"step": {"value": float(steps), "dtype": "float32"}}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer["param_groups"]]
        return {
            "client_state": {k: v for k, v in self.job.items() if k not in _OF_DEEPSPEED},
            "optimizer_groups": groups,
            "optimizer_scalars": scalars,
            "lr_scheduler": self.job.get("lr_scheduler"),
            "loss_scaler": {"class": type(scaler).__name__, "state": vars(scaler) if scaler is not None else {}},
        }


def open_universal(folder: Path, tag: str | None) -> UniversalCheckpoint | None:
    """Collective. The universal checkpoint ``tag`` below ``folder``, or the one that ``latest_universal`` names.

    Raises:
        CheckpointError: ``folder`` holds a checkpoint of DeepSpeed's own instead, a file is missing or broken, or it
            holds what cannot be loaded safely; on every rank.
    """
    found: list[UniversalCheckpoint] = []

    def look() -> dict[str, Any]:
        path = _find(folder, tag)
        if path is not None:
            try:
                found.append(_open(path))
                found[0].state()
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise CheckpointError(f"checkpoint: {path} is not of the universal format: {error!r}") from None
        return {"universal checkpoint": str(path)}

    agree(look)
    return found[0] if found else None


def _find(folder: Path, tag: str | None) -> Path | None:
    for name in ("latest", LATEST) if tag is None else ():
        if (folder / name).is_file():
            tag = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
            if not (folder / tag / "zero").is_dir() and name == "latest" and (folder / LATEST).is_file():
                continue
            break
    if tag is None or Path(tag).name != tag or is_complete(folder / tag):
        return None
    path = folder / tag
    if (path / "zero").is_dir():
        return path
    if any(path.glob("*_model_states.pt")):
        raise CheckpointError(
            f"checkpoint: {path} is one of DeepSpeed's own; takes its universal format: python -m deepspeed.checkpoint."
            f"ds_to_universal --inject_missing_state --input_folder {path} --output_folder {path}_universal"
        )
    return None


def _open(path: Path) -> UniversalCheckpoint:
    job, optimizer = _load(_job_file(path)), _load(path / "zero" / "optimizer_state.pt")
    kinds = sorted({file.stem for _, file in _files(path)} - {"fp32", "step"})
    meta = {
        # Adam's state is the same in all its implementations; of others the format does not say the name.
        "optimizer": "Adam" if kinds == ["exp_avg", "exp_avg_sq"] else None,
        "optimizer_state": kinds,
        "world_size": None,
        "global_steps": job["global_steps"],
        "global_samples": job.get("global_samples", 0),
        "micro_steps": 0,
        "skipped_steps": job["skipped_steps"],
    }
    return UniversalCheckpoint(path, meta, UniversalSource(path, job), job=job, optimizer=optimizer)


class UniversalSource(Source):
    """DeepSpeed's files as the logical tensors of SDP's checkpoints."""

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self._files = {(_kind(file), parameter): file for parameter, file in _files(path) if file.stem != "step"}
        self._shapes = {name: shape for group in job.get("param_shapes") or () for name, shape in group.items()}
        self._frozen: dict[str, torch.Tensor] = job.get("module") or {}

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        if (kind, name) in self._files:
            return tuple(self._shapes[name] if name in self._shapes else self._value(kind, name).shape)
        is_frozen = kind == "model" and name in self._frozen and ("master", name) not in self._files
        return tuple(self._frozen[name].shape) if is_frozen else None

    def held(self, kind: str, wanted: Run) -> Iterator[tuple[Run, Read]]:
        # At stage 3 it is flat, and may be padded.
        flat = self._value(kind, wanted.name).reshape(-1)
        if len(flat) >= math.prod(wanted.shape):
            yield whole(wanted.name, wanted.shape), lambda start, stop: flat[start:stop]

    def _value(self, kind: str, name: str) -> torch.Tensor:
        return self._frozen[name] if kind == "model" else _value(self._files[kind, name])


def _kind(file: Path) -> str:
    return "master" if file.stem == "fp32" else f"optimizer.{file.stem}"


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Parameters and their files."""
    for file in sorted(path.glob("zero/*/*.pt")):
        yield file.parent.name, file


def _job_file(path: Path) -> Path:
    files = sorted(path.glob("*_model_states.pt"))
    if not files:
        raise CheckpointError(f"checkpoint: {path} lacks *_model_states.pt")
    return files[0]


def _first_step(path: Path) -> Any:
    file = next(path.glob("zero/*/step.pt"), None)
    return None if file is None else _load(file)


def _value(file: Path) -> torch.Tensor:
    loaded = _load(file)
    value: torch.Tensor = loaded["param"] if isinstance(loaded, dict) else loaded
    return value


def _load(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint: {file} is refused: {str(error).splitlines()[0]}") from None
