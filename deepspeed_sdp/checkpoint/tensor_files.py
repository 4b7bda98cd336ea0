"""Storage of ``torch.distributed.checkpoint`` as safetensors files and one JSON index: nothing is ever unpickled.

Every rank writes its rectangles into files of its own; ``index.json`` says which rectangle of which logical tensor lies
in which file under which key.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from deepspeed_sdp.errors import CheckpointError

INDEX = "index.json"

# A file's tensors are copied once more while they are written.
_FILE_BYTES = 256 << 20


class TensorFileWriter(StorageWriter):
    """Writes this rank's rectangles into ``tensors-<rank>-<number>.safetensors`` below ``folder``, and fsyncs them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_batches(plan.items)):
            name = f"tensors-{self._rank:05d}-{number:03d}.safetensors"
            tensors = {}
            for key, item in enumerate(items):
                value = planner.resolve_data(item)
                assert isinstance(value, torch.Tensor)
                tensors[str(key)] = value.detach().to("cpu").contiguous()
                nbytes = value.numel() * value.element_size()
                results.append(WriteResult(item.index, nbytes, {"file": name, "key": str(key)}))
            save_file(tensors, self._folder / name)
            fsync(self._folder / name)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    **stored[MetadataIndex(name, chunk.offsets)],
                }
                for chunk in tensor.chunks
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(tensor.size), "chunks": chunks}
        write_json(self._folder / INDEX, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class TensorFileReader(StorageReader):
    """Reads rectangles of what :class:`TensorFileWriter` wrote, no more of a file than is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[MetadataIndex, dict[str, str]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(read_index(self._folder, self._places)))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not self._places:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = defaultdict(list)
        for item in plan.items:
            by_file[self._places[item.storage_index]["file"]].append(item)
        for name, items in by_file.items():
            try:
                with safe_open(self._folder / name, framework="pt") as file:
                    for item in items:
                        stored = file.get_slice(self._places[item.storage_index]["key"])
                        ranges = zip(item.storage_offsets, item.lengths, strict=True)
                        value = stored[tuple(slice(start, start + length) for start, length in ranges)]
                        target = planner.resolve_tensor(item)
                        target.copy_(value.view(target.shape))
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint: cannot read {self._folder / name}: {error}") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_index(
    folder: Path, places: dict[MetadataIndex, dict[str, str]] | None = None
) -> dict[str, TensorStorageMetadata]:
    """The logical tensors of a checkpoint; ``places`` learns file and key of every rectangle.

    Raises:
        CheckpointError: the index is missing or broken.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, described in read_json(folder / INDEX).items():
        chunks = []
        for place, chunk in enumerate(described["chunks"]):
            if Path(chunk["file"]).name != chunk["file"]:
                raise CheckpointError(f"checkpoint: {folder / INDEX} names {chunk['file']!r}; takes files beside it")
            offsets = torch.Size(chunk["offsets"])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            if places is not None:
                places[MetadataIndex(name, offsets, place)] = {"file": chunk["file"], "key": chunk["key"]}
        dtype = getattr(torch, described["dtype"])
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(described["shape"]), chunks)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: names the file when it is missing or broken.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint: {path} holds a {type(value).__name__}; takes a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write and fsync."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fsync(path)


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batches(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    batch: list[WriteItem] = []
    nbytes = 0
    for item in items:
        assert item.tensor_data is not None
        size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if batch and nbytes + size > _FILE_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(item)
        nbytes += size
    if batch:
        yield batch
