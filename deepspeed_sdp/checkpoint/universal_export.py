"""From a checkpoint to DeepSpeed's universal format, which dense DeepSpeed loads with its optimizer state.

The layout is what ``deepspeed.checkpoint.ds_to_universal`` writes: one folder per parameter with its fp32 weights and
moments, beside the state that all parameters share.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.export import shapes_of_weights
from deepspeed_sdp.checkpoint.full_scale import Scaling, parameter_of, scaling_of
from deepspeed_sdp.checkpoint.meta import full_model
from deepspeed_sdp.checkpoint.reading import load_state
from deepspeed_sdp.checkpoint.recovery import usable
from deepspeed_sdp.checkpoint.tensor_files import TensorFiles
from deepspeed_sdp.errors import OutputError
from deepspeed_sdp.files import begin_folder, fsync, replace_folder, write_text

LATEST = "latest_universal"


def export_universal(checkpoint: Path, out: Path) -> Path:
    """Write ``checkpoint`` below ``out`` under its own tag, in place of what has it; one tensor is in memory at a time.

    A DeepSpeed job takes it up with ``"checkpoint": {"load_universal": true}`` and ``load_checkpoint(out)``.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        OutputError: ``out`` cannot be written.
    """
    manifest = folders.read_manifest(checkpoint)
    meta, files, shapes = usable(checkpoint, manifest, folders.damage(checkpoint, manifest))
    state = load_state(checkpoint)
    config, _ = full_model(meta, shapes_of_weights(shapes))
    scaled = scaling_of(checkpoint, meta, config)
    final = out / checkpoint.name
    try:
        staging = begin_folder(final)
        try:
            _write_parameters(files, shapes, staging / "zero", _step(state["optimizer_scalars"]), scaled)
            _write_shared(staging, meta, state)
            for path in staging.rglob("*"):
                fsync(path)
            replace_folder(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        write_text(out / LATEST, checkpoint.name)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error}") from None
    return final


def _write_parameters(files: TensorFiles, shapes: Iterable[str], folder: Path, step: Any, scaled: Scaling) -> None:
    for logical in shapes:
        name = parameter_of(logical)
        kind = logical.removesuffix(f".{name}")
        file = kind.removeprefix("optimizer.") if kind.startswith("optimizer.") else "fp32"
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        value = scaled(logical, files.tensor(kind, name))
        value = value.float() if value.is_floating_point() else value
        # `param` and `cat_dim` are DeepSpeed's keys.
        torch.save({"param": value, "cat_dim": 0}, target / f"{file}.pt")
        if kind == "master" and step is not None:
            torch.save(step, target / "step.pt")


def _write_shared(folder: Path, meta: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    step = _step(state["optimizer_scalars"])
    optimizer = {
        "param_groups": state["optimizer_groups"],
        "dynamic_loss_scale": state["loss_scaler"]["class"] == "DynamicLossScaler",
        "overflow": False,
        "ds_version": meta["versions"]["deepspeed"],
        # Stage 3 looks for the shared step here.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": state["optimizer_groups"]},
    }
    torch.save(optimizer, folder / "zero" / "optimizer_state.pt")
    shared = {
        **state["client_state"],
        "module": {},
        "lr_scheduler": state["lr_scheduler"],
        "global_steps": meta["global_steps"],
        "global_samples": meta["global_samples"],
        "skipped_steps": meta["skipped_steps"],
        "dp_world_size": meta["world_size"],
        "mp_world_size": 1,
        "ds_version": meta["versions"]["deepspeed"],
    }
    # DeepSpeed's names up to stage 2, and at stage 3.
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(shared, folder / name)


def _step(scalars: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Any:
    """The count of steps of the first group that has one."""
    scalars = [scalars] if isinstance(scalars, Mapping) else scalars  # as older versions wrote them
    step = next((of_group["step"] for of_group in scalars if "step" in of_group), None)
    if step is None or step["dtype"] is None:
        return step and step["value"]
    return torch.tensor(step["value"], dtype=getattr(torch, step["dtype"]))
