"""From a checkpoint to a HuggingFace folder: one process, no accelerator, a shard of the model in memory at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.full_scale import scaling_of
from deepspeed_sdp.checkpoint.hf_names import saved_names
from deepspeed_sdp.checkpoint.meta import full_model
from deepspeed_sdp.checkpoint.model_folder import model_folder
from deepspeed_sdp.checkpoint.recovery import usable
from deepspeed_sdp.errors import OutputError

SHARD_BYTES = 2 << 30


def export(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    subnetwork: int | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the full model of ``checkpoint``, or one worker's subnetwork, into ``out``.

    Args:
        dtype: of the weights; by default that of the training.
        tokenizer: a folder whose tokenizer is copied.
        subnetwork: index of a worker: its subnetwork as a smaller model of the same family.
        shard_bytes: largest file, and about the memory that is needed; a larger weight is a file of its own.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or the family cannot express the subnetwork.
        OutputError: ``out`` cannot be written.
    """
    from transformers import AutoTokenizer

    manifest = folders.read_manifest(checkpoint)
    meta, files, shapes = usable(checkpoint, manifest, folders.damage(checkpoint, manifest))
    dtype = dtype or getattr(torch, meta["dtype"])
    config, model = full_model(meta, shapes_of_weights(shapes))
    config.dtype = dtype
    names = saved_names(model)
    kinds = (logical.partition(".")[::2] for logical in shapes)
    # As they are trained, one at a time; fp32 where trained.
    weights: Iterator[tuple[str, torch.Tensor]]
    weights = ((name, files.tensor(kind, name)) for kind, name in kinds if kind != "optimizer")
    if subnetwork is None:
        scaled = scaling_of(checkpoint, meta, config)
        weights = ((name, scaled(f"master.{name}", value)) for name, value in weights)
    else:
        from deepspeed_sdp.checkpoint.subnetwork_export import carve

        weights = carve(checkpoint, meta, config, subnetwork, weights)
    try:
        with model_folder(out) as staging:
            _write_shards(
                ((names.get(name, name), _cast(value, dtype)) for name, value in weights), staging, shard_bytes
            )
            config.save_pretrained(staging)
            if tokenizer is not None:
                AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(staging)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk gives
        raise OutputError(f"cannot write {out}: {error}") from None


def shapes_of_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Size]:
    """Shapes of the full model's weights, by their HuggingFace names, out of those of all logical tensors."""
    split = ((name.partition("."), shape) for name, shape in shapes.items())
    return {name: torch.Size(shape) for (kind, _, name), shape in split if kind in ("master", "model")}


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    total = 0

    def write(shard: dict[str, torch.Tensor]) -> None:
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))

    held: dict[str, torch.Tensor] = {}
    nbytes = 0
    for name, value in weights:
        size = value.numel() * value.element_size()
        if held and nbytes + size > shard_bytes:
            write(held)
            held, nbytes = {}, 0
        held[name] = value.contiguous()
        nbytes, total = nbytes + size, total + size
    write(held)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        os.replace(folder / f"{i}.part", folder / name)
