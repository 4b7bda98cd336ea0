"""Which rectangle of which logical tensor lies in which file: ``index.json``."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from deepspeed_sdp.checkpoint.json_files import read_json, write_json
from deepspeed_sdp.errors import CheckpointError

INDEX = "index.json"

_COPY = "@copy"

# Names become folders of other formats.
_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)+")


@dataclass(frozen=True)
class Place:
    """Where a rectangle lies: in ``file``, under ``key``."""

    file: str
    key: str


def name_of_copy(name: str, copy: int) -> str:
    """How ``torch.distributed.checkpoint``, which takes each element once, is told of a further copy of a tensor."""
    return f"{name}{_COPY}{copy}" if copy else name


def write_index(folder: Path, metadata: Metadata, results: Iterable[WriteResult]) -> None:
    """Write the index of what all ranks wrote; every copy of a tensor lies in the same rectangles."""
    places: dict[MetadataIndex, list[Place]] = defaultdict(list)
    for result in sorted(results, key=lambda result: str(result.index.fqn.partition(_COPY)[2])):
        places[MetadataIndex(result.index.fqn.partition(_COPY)[0], result.index.offset)].append(result.storage_data)
    tensors: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if _COPY in name:
            continue
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            first, *copies = map(asdict, places[MetadataIndex(name, chunk.offsets)])
            described = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **first}
            chunks.append({**described, "copies": copies} if copies else described)
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(tensor.size), "chunks": chunks}
    write_json(folder / INDEX, tensors)


def read_index(
    folder: Path, places: dict[MetadataIndex, Place] | None = None, lost: Container[str] = ()
) -> dict[str, TensorStorageMetadata]:
    """The logical tensors of a checkpoint.

    Args:
        places: learns the place of every rectangle.
        lost: files that cannot be used.

    Raises:
        CheckpointError: the index is missing or broken, or a rectangle is in lost files alone.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, described in read_json(folder / INDEX).items():
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"checkpoint: {folder / INDEX} names a tensor {name!r}; takes dotted names")
        chunks = []
        for number, chunk in enumerate(described["chunks"]):
            offsets = torch.Size(chunk["offsets"])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            if places is not None:
                places[MetadataIndex(name, offsets, number)] = _place(folder, name, chunk, lost)
        dtype = getattr(torch, described["dtype"])
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(described["shape"]), chunks)
    return tensors


def _place(folder: Path, name: str, chunk: dict[str, Any], lost: Container[str]) -> Place:
    candidates = [Place(c["file"], c["key"]) for c in (chunk, *chunk.get("copies", ()))]
    for place in candidates:
        if Path(place.file).name != place.file or place.file == "..":
            raise CheckpointError(f"checkpoint: {folder / INDEX} names {place.file!r}; takes files beside it")
    left = [place for place in candidates if place.file not in lost]
    if not left:
        raise CheckpointError(
            f"checkpoint: a part of {name} is in {' and '.join(place.file for place in candidates)} alone"
        )
    return left[0]
