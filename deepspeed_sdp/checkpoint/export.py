"""From a checkpoint to a HuggingFace folder: one process, no accelerator, a shard of the model in memory at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.tensor_files import read_index, read_json
from deepspeed_sdp.checkpoint.writing import META
from deepspeed_sdp.errors import CheckpointError, OutputError

SHARD_BYTES = 2 << 30


def export(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the full model of ``checkpoint`` into ``out``.

    Args:
        dtype: of the weights; by default that of the training.
        tokenizer: a folder whose tokenizer is copied.
        shard_bytes: largest file, and about the memory that is needed; a larger weight is a file of its own.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        OutputError: ``out`` cannot be written.
    """
    from transformers import AutoConfig, AutoTokenizer

    files = folders.read_manifest(checkpoint)
    found = folders.damage(checkpoint, files, files)
    if found:
        raise folders.damaged(checkpoint, found)
    meta = read_json(checkpoint / META)
    dtype = dtype or getattr(torch, meta["dtype"])
    config = AutoConfig.for_model(**meta["model_config"])
    config.dtype = dtype
    config.architectures = [meta["model_class"]]
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=out))
        try:
            _write_shards(checkpoint, staging, dtype, shard_bytes)
            config.save_pretrained(staging)
            if tokenizer is not None:
                AutoTokenizer.from_pretrained(tokenizer).save_pretrained(staging)
            for stale in out.glob("model*.safetensors*"):
                stale.unlink()
            for file in sorted(staging.iterdir()):
                os.replace(file, out / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error}") from None


def _write_shards(checkpoint: Path, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    sizes: list[int] = []
    tensors = dict(_weights(checkpoint))
    for name, (_, tensor) in tensors.items():
        nbytes = tensor.size.numel() * dtype.itemsize
        if not shards or sizes[-1] + nbytes > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += nbytes
    places: dict[MetadataIndex, dict[str, str]] = {}
    read_index(checkpoint, places)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, shard in zip(names, shards, strict=True):
        loaded = {name: _read(checkpoint, *tensors[name], places, dtype) for name in shard}
        save_file(loaded, folder / file, metadata={"format": "pt"})


def _weights(checkpoint: Path) -> Iterator[tuple[str, tuple[str, TensorStorageMetadata]]]:
    for logical, tensor in read_index(checkpoint).items():
        kind, _, name = logical.partition(".")
        if kind in ("master", "model"):
            yield name, (logical, tensor)


def _read(
    checkpoint: Path,
    logical: str,
    tensor: TensorStorageMetadata,
    places: dict[MetadataIndex, dict[str, str]],
    dtype: torch.dtype,
) -> torch.Tensor:
    is_float = tensor.properties.dtype.is_floating_point
    full = torch.empty(tensor.size, dtype=dtype if is_float else tensor.properties.dtype)
    covered = 0
    for chunk in tensor.chunks:
        place = places[MetadataIndex(logical, chunk.offsets)]
        with safe_open(checkpoint / place["file"], framework="pt") as file:
            value = file.get_tensor(place["key"])
        ranges = zip(chunk.offsets, chunk.sizes, strict=True)
        full[tuple(slice(start, start + size) for start, size in ranges)] = value.view(chunk.sizes)
        covered += value.numel()
    if covered != full.numel():
        raise CheckpointError(f"checkpoint: lacks a part of {logical}")
    return full
