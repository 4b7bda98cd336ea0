"""Which rectangle of which logical tensor lies in which file: ``index.json``."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, TypeAdapter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from deepspeed_sdp.checkpoint.json_files import Count, FileName, Schema, read_as, write_json
from deepspeed_sdp.errors import CheckpointError

INDEX = "index.json"

_COPY = "@copy"

_Sizes = Annotated[list[Count], Field(max_length=8)]


@dataclass(frozen=True)
class Place:
    """Where a rectangle lies: in ``file``, under ``key``."""

    file: str
    key: str


class _Place(Schema):
    file: FileName
    key: Annotated[str, StringConstraints(max_length=128)]


class _Chunk(_Place):
    offsets: _Sizes
    sizes: _Sizes
    copies: Annotated[list[_Place], Field(max_length=1 << 16, default_factory=list)]


class _Tensor(Schema):
    dtype: Literal[
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
    ]  # fmt: skip
    shape: _Sizes
    chunks: list[_Chunk]


# Names become folders of other formats.
_Name = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*(\.[\w-]+)+$", max_length=1000)]
_INDEX = TypeAdapter(dict[_Name, _Tensor])


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
    folder: Path,
    places: dict[MetadataIndex, Place] | None = None,
    lost: Container[str] = (),
    files: Mapping[str, int] | None = None,
) -> dict[str, TensorStorageMetadata]:
    """The logical tensors of a checkpoint.

    Args:
        places: learns the place of every rectangle.
        lost: files that cannot be used.
        files: those that there are, and their bytes.

    Raises:
        CheckpointError: the index is missing or broken; rectangles of a tensor overlap or leave a gap; one is in lost
            files alone, or in one that is not there or too small.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    held: Counter[str] = Counter()
    for name, described in read_as(folder / INDEX, _INDEX).items():
        dtype = getattr(torch, described.dtype)
        if not _is_cover(described):
            raise CheckpointError(f"checkpoint: {folder / INDEX}: the parts of {name} overlap, or lack a part of it")
        chunks = []
        for number, chunk in enumerate(described.chunks):
            offsets = torch.Size(chunk.offsets)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            for copy in (chunk, *chunk.copies):
                held[copy.file] += math.prod(chunk.sizes) * dtype.itemsize
            place = _place(name, chunk, lost)
            if places is not None:
                places[MetadataIndex(name, offsets, number)] = place
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(described.shape), chunks)
    for file, nbytes in held.items():
        if files is not None and nbytes > files.get(file, -1):
            found = f"has {files[file]} bytes" if file in files else "is not in the manifest"
            raise CheckpointError(f"checkpoint: {folder / INDEX} has {nbytes} bytes in {file}, which {found}")
    return tensors


def _is_cover(tensor: _Tensor) -> bool:
    """Whether every element is in one rectangle and no rectangle reaches beyond the tensor.

    Corners of a rectangle, with alternating signs, are the mixed differences of the function that is 1 inside and 0
    outside. Functions are equal where these are: so sums over all rectangles are compared with the whole tensor's.
    """
    dims = len(tensor.shape)
    corners: Counter[tuple[int, ...]] = Counter()
    whole = ([0] * dims, tensor.shape, -1)
    for offsets, sizes, sign in (whole, *((chunk.offsets, chunk.sizes, 1) for chunk in tensor.chunks)):
        if len(offsets) != dims or len(sizes) != dims:
            return False
        for ends in itertools.product((0, 1), repeat=dims):
            corner = tuple(o + s * end for o, s, end in zip(offsets, sizes, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _place(name: str, chunk: _Chunk, lost: Container[str]) -> Place:
    candidates = (chunk, *chunk.copies)
    for place in candidates:
        if place.file not in lost:
            return Place(place.file, place.key)
    raise CheckpointError(
        f"checkpoint: a part of {name} is in {' and '.join(place.file for place in candidates)} alone"
    )
