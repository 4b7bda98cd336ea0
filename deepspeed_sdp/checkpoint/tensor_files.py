"""Storage of ``torch.distributed.checkpoint`` as safetensors files and one JSON index: nothing is ever unpickled.

Every rank writes its rectangles into files of its own; ``index.json`` says which rectangle of which logical tensor lies
in which file under which key.
"""

from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from deepspeed_sdp.checkpoint.index import Place, read_index, write_index
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.files import fsync, share

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
                results.append(WriteResult(item.index, nbytes, Place(name, str(key))))
            save_file(tensors, self._folder / name)
            share(self._folder / name)
            fsync(self._folder / name)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        write_index(self._folder, metadata, (result for of_rank in results for result in of_rank))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class TensorFileReader(StorageReader):
    """Reads rectangles of what :class:`TensorFileWriter` wrote, no more of a file than is asked for.

    Args:
        folder: of the checkpoint.
        lost: files that cannot be used; what was in them is read from copies.
    """

    def __init__(self, folder: Path, lost: Container[str] = ()) -> None:
        self._folder = folder
        self._lost = lost
        self._places: dict[MetadataIndex, Place] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(read_index(self._folder, self._places, self._lost)))

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
            by_file[self._places[item.storage_index].file].append(item)
        for name, items in by_file.items():
            try:
                with safe_open(self._folder / name, framework="pt") as file:
                    for item in items:
                        stored = file.get_slice(self._places[item.storage_index].key)
                        ranges = zip(item.storage_offsets, item.lengths, strict=True)
                        value = stored[tuple(slice(start, start + length) for start, length in ranges)]
                        if value.numel() != item.lengths.numel():
                            raise CheckpointError(
                                f"checkpoint: {self._folder / name} lacks a part of {item.storage_index.fqn}"
                            )
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
