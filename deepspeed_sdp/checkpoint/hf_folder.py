"""A HuggingFace folder as a checkpoint of weights alone: where a job begins from a model that exists."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from deepspeed_sdp.checkpoint.index import Place
from deepspeed_sdp.checkpoint.tensor_files import TensorFileReader
from deepspeed_sdp.errors import CheckpointError


def is_hf_folder(folder: Path) -> bool:
    """Whether it holds a model in safetensors files and no checkpoints."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


class HFFolderReader(TensorFileReader):
    """Weights under the names that a checkpoint has for them: ``master.<name>``, or ``model.<name>`` if not trained."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in sorted(file.keys()):
                        stored = file.get_slice(key)
                        size, dtype = torch.Size(stored.get_shape()), stored[:0].dtype
                        for name in (f"master.{key}", f"model.{key}"):
                            offsets = torch.Size([0] * len(size))
                            chunk = ChunkStorageMetadata(offsets, size)
                            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])
                            self._places[MetadataIndex(name, offsets)] = Place(path.name, key)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None
        return Metadata(tensors)
