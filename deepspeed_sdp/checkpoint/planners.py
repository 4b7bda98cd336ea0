"""Planners of ``torch.distributed.checkpoint`` for rectangles of logical full tensors.

Its own planners know a rank's part of a tensor as one DTensor; here it is any number of rectangles, which no mesh
describes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from deepspeed_sdp.checkpoint.index import name_of_copy
from deepspeed_sdp.checkpoint.region import Entry
from deepspeed_sdp.errors import CheckpointError


class EntrySavePlanner(DefaultSavePlanner):
    """Plans the writing of this rank's entries; each element of a copy of a logical tensor is one rank's alone."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._entries = {MetadataIndex(name_of_copy(e.name, e.copy), e.region.offsets): e for e in entries}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(index, entry) for index, entry in self._entries.items()])

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._entries[write_item.index].tensor


class EntryLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of this rank's entries out of whatever rectangles the checkpoint has."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self._entries = {MetadataIndex(e.name, e.region.offsets): e for e in entries}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for entry in self._entries.values():
            name = self._stored_name(entry.name)
            if name is None:
                continue
            stored = self._stored[name]
            assert isinstance(stored, TensorStorageMetadata)
            if tuple(stored.size) != entry.shape:
                raise CheckpointError(
                    f"checkpoint: {entry.name} has shape {list(stored.size)}; the model takes {list(entry.shape)}"
                )
            wanted = ChunkStorageMetadata(torch.Size(entry.region.offsets), torch.Size(entry.region.sizes))
            found = create_read_items_for_chunk_list(name, stored, [wanted])
            if sum(item.lengths.numel() for item in found) != entry.region.numel:
                raise CheckpointError(f"checkpoint: lacks a part of {entry.name}")
            target = MetadataIndex(entry.name, wanted.offsets)
            items += [replace(item, dest_index=target) for item in found]
        return LoadPlan(items)

    def _stored_name(self, name: str) -> str | None:
        """Under which name it is in the checkpoint; ``None`` for state that a parameter did not have there.

        A parameter may be trained in one job and frozen in another.
        """
        kind, _, parameter = name.partition(".")
        weights = f"master.{parameter}" if kind == "model" else f"model.{parameter}"
        if name in self._stored:
            return name
        if kind in ("master", "model") and weights in self._stored:
            return weights
        if kind == "optimizer" and f"model.{parameter.partition('.')[2]}" in self._stored:
            return None
        raise CheckpointError(f"checkpoint: holds no {name}")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return new_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._entries[read_item.dest_index].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _write_item(index: MetadataIndex, entry: Entry) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(entry.region.offsets), torch.Size(entry.region.sizes))
    properties = TensorProperties(dtype=entry.tensor.dtype)
    data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(entry.shape))
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)
