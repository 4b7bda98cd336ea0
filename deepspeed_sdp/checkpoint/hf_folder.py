"""A HuggingFace folder as a checkpoint of weights alone: where a job begins from a model that exists."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from deepspeed_sdp.checkpoint.hf_names import saved_names
from deepspeed_sdp.checkpoint.index import Place
from deepspeed_sdp.checkpoint.json_files import FileName, Schema, read_as
from deepspeed_sdp.checkpoint.tensor_files import TensorFileReader
from deepspeed_sdp.errors import CheckpointError, SDPError
from deepspeed_sdp.subnetwork import meta_model, read_model_config

_FILES = "*.safetensors"


def is_hf_folder(folder: Path) -> bool:
    """Whether it holds a model in safetensors files and no checkpoints."""
    return (folder / "config.json").is_file() and any(folder.glob(_FILES))


class _Index(Schema):
    weight_map: dict[str, FileName]
    metadata: Annotated[dict[str, Any], Field(default_factory=dict)]


class HFFolderReader(TensorFileReader):
    """Weights under the names that a checkpoint has for them: ``master.<name>``, or ``model.<name>`` if not trained."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        own = self._own_names()
        for path, keys in self._files():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in sorted(file.keys()) if keys is None else sorted(keys):
                        stored = file.get_slice(key)
                        size, dtype = torch.Size(stored.get_shape()), stored[:0].dtype
                        for name in (f"master.{own.get(key, key)}", f"model.{own.get(key, key)}"):
                            if name in tensors:
                                raise CheckpointError(f"checkpoint: {self._folder} holds {key} twice")
                            offsets = torch.Size([0] * len(size))
                            chunk = ChunkStorageMetadata(offsets, size)
                            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])
                            self._places[MetadataIndex(name, offsets)] = Place(path.name, key)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None
        return Metadata(tensors)

    def _files(self) -> Iterator[tuple[Path, set[str] | None]]:
        """Those that ``from_pretrained`` takes, and which of their tensors (``None``: all)."""
        single, index = self._folder / "model.safetensors", self._folder / "model.safetensors.index.json"
        if single.is_file() or not index.is_file():
            yield from ((path, None) for path in ([single] if single.is_file() else sorted(self._folder.glob(_FILES))))
            return
        by_file: dict[str, set[str]] = defaultdict(set)
        for key, file in read_as(index, _Index).weight_map.items():
            by_file[file].add(key)
        yield from ((self._folder / file, keys) for file, keys in sorted(by_file.items()))

    def _own_names(self) -> dict[str, str]:
        """Name in the folder -> name in the model, for a family that transformers knows."""
        try:
            names = saved_names(meta_model(read_model_config(self._folder, "config.json"), "config.json"))
        except (OSError, ValueError, SDPError):  # then they are taken as they are
            return {}
        return {saved: name for name, saved in names.items()}
