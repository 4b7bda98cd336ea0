"""Which elements of the full model lie where in the tensor files of one worker's ranks: ``layout-<worker>.json``.

A rank's file has one tensor for every copy, section and kind: its shards of the section's buckets, one after the other.
All ranks of a worker hold the same buckets and all owners of a bucket describe it alike, so a layout says where every
shard of its buckets is, whoever wrote it, and does not grow with the number of ranks but by the lists of owners.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, StringConstraints

from deepspeed_sdp.checkpoint.json_files import Count, Schema, read_as
from deepspeed_sdp.checkpoint.runs import Rectangle, Run
from deepspeed_sdp.errors import CheckpointError

Writers = tuple[tuple[int, ...], ...]
"""For every copy of a bucket, the ranks that wrote its shards, in the order of the shards."""

_MOST_ELEMENTS = 1 << 56


@dataclass(frozen=True)
class Held:
    """A bucket in files.

    Attributes:
        owners: index of who wrote its shards.
        runs: its elements in their order.
        share: elements of a shard; the last ones may have fewer, or none.
    """

    owners: int
    runs: tuple[Run, ...]
    share: int

    @cached_property
    def numel(self) -> int:
        """Elements of all shards."""
        return sum(run.numel for run in self.runs)


@dataclass(frozen=True)
class Section:
    """Buckets of which the same is kept.

    Attributes:
        kinds: dtype of every kind: ``"master"``, ``"optimizer.<key>"`` or ``"model"``.
        buckets: in the order in which their shards lie in files.
    """

    kinds: Mapping[str, torch.dtype]
    buckets: Sequence[Held]


@dataclass(frozen=True)
class Found:
    """Where a run is in a layout: ``base`` elements after the beginning of a bucket."""

    section: int
    bucket: int
    base: int
    run: Run


@dataclass(frozen=True)
class Layout:
    """What the ranks of one worker wrote, and where all shards of these buckets are."""

    owners: Sequence[Writers]
    sections: Sequence[Section]
    _shards: dict[tuple[int, int, int], Any] = field(default_factory=dict, compare=False)

    @cached_property
    def found(self) -> dict[str, list[Found]]:
        """Where runs of a tensor are, by its name."""
        found = defaultdict(list)
        for number, section in enumerate(self.sections):
            for place, bucket in enumerate(section.buckets):
                base = 0
                for run in bucket.runs:
                    found[run.name].append(Found(number, place, base, run))
                    base += run.numel
        return dict(found)

    def shards(self, section: int, copy: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """For every bucket of a section, where in its tensor ``rank`` has its shard of a copy.

        Returns:
            starts and stops, int64 ``[buckets]``.
        """
        key = (section, copy, rank)
        if key not in self._shards:
            # Who owns nothing of a bucket stands behind its last shard.
            places = np.array([
                ranks[copy].index(rank) if copy < len(ranks) and rank in ranks[copy] else len(ranks[0])
                for ranks in self.owners
            ], np.int64)  # fmt: skip
            owners, shares, numels = self._numbers[section]
            starts = places[owners] * shares
            lengths = np.minimum(starts + shares, numels) - np.minimum(starts, numels)
            stops = np.cumsum(lengths)
            self._shards[key] = stops - lengths, stops
        found: tuple[np.ndarray, np.ndarray] = self._shards[key]
        return found

    @cached_property
    def _numbers(self) -> list[np.ndarray]:
        rows = ([(b.owners, b.share, b.numel) for b in section.buckets] for section in self.sections)
        return [np.array(of_section, np.int64).reshape(-1, 3).T for of_section in rows]

    def tensors(self, rank: int) -> Iterator[tuple[int, int, str, torch.dtype, int]]:
        """What the file of ``rank`` has: copy, section, kind, dtype and number of elements; no empty ones."""
        for copy in range(max((len(ranks) for ranks in self.owners), default=0)):
            for number, section in enumerate(self.sections):
                stops = self.shards(number, copy, rank)[1]
                if len(stops) and stops[-1]:
                    for kind, dtype in section.kinds.items():
                        yield copy, number, kind, dtype, int(stops[-1])

    def to_json(self) -> str:
        """The text of its file."""
        places: dict[str, int] = {}
        shapes: dict[str, Any] = {}
        runs: list[list[int]] = []
        sections = []
        for section in self.sections:
            buckets = []
            for bucket in section.buckets:
                buckets.append([bucket.owners, len(runs), len(bucket.runs), bucket.share])
                for run in bucket.runs:
                    shapes[run.name] = run.shape
                    place = places.setdefault(run.name, len(places))
                    runs.append([place, run.rows, run.column, run.width, run.start, run.stop])
            kinds = {kind: str(dtype).removeprefix("torch.") for kind, dtype in section.kinds.items()}
            sections.append({"kinds": kinds, "buckets": buckets})
        content = {"tensors": shapes, "runs": runs, "owners": self.owners, "sections": sections}
        return json.dumps(content, separators=(",", ":")) + "\n"


def layout_file(worker: int) -> str:
    """Name of the file of a worker's layout."""
    return f"layout-{worker:05d}.json"


def tensor_key(copy: int, section: int, kind: str) -> str:
    """Name of a tensor in a rank's file."""
    return f"{copy}.{section}.{kind}"


# Names become folders of other formats.
_Name = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*(\.[\w-]+)*$", max_length=1000)]
_Kind = Annotated[str, StringConstraints(pattern=r"^(master|model|optimizer\.\w{1,200})$")]
_DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
_Shape = Annotated[list[Count], Field(max_length=8)]
_Rank = Annotated[int, Field(ge=0, lt=1 << 24)]


class _Section(Schema):
    kinds: Annotated[dict[_Kind, _DType], Field(min_length=1, max_length=64)]
    buckets: list[Annotated[list[Count], Field(min_length=4, max_length=4)]]


class _Layout(Schema):
    tensors: dict[_Name, _Shape]
    runs: list[Annotated[list[Count], Field(min_length=6, max_length=6)]]
    owners: list[Annotated[list[Annotated[list[_Rank], Field(min_length=1)]], Field(min_length=1)]]
    sections: list[_Section]


def read_layout(checkpoint: Path, worker: int) -> Layout:
    """The layout of a worker.

    Raises:
        CheckpointError: it is missing or broken, or contradicts itself.
    """
    path = checkpoint / layout_file(worker)
    content = read_as(path, _Layout)

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"checkpoint: {path}: {what}")

    for ranks in content.owners:
        if any(len(copy) != len(ranks[0]) or len(set(copy)) != len(copy) for copy in ranks):
            raise refuse("owners: a rank stands twice, or copies have different numbers of them")
    runs, tensors = [], list(content.tensors.items())
    for place, (tensor, rows, column, width, start, stop) in enumerate(content.runs):
        if tensor >= len(tensors):
            raise refuse(f"runs.{place}: there is no tensor {tensor}")
        name, shape = tensors[tensor]
        numel = math.prod(shape)
        if numel > _MOST_ELEMENTS or not rows or numel % rows or column + width > numel // rows:
            raise refuse(f"runs.{place}: {name} has shape {shape}")
        if not start < stop <= rows * width:
            raise refuse(f"runs.{place}: the parts of {name} overlap, or lack a part of it")
        runs.append(Run(name, tuple(shape), rows, column, width, start, stop))
    sections = []
    taken = 0
    for number, section in enumerate(content.sections):
        buckets = []
        for owners, first, count, share in section.buckets:
            if owners >= len(content.owners) or first != taken or not 0 < count <= len(runs) - first:
                raise refuse(f"sections.{number}: a bucket has no owners, or no runs of its own")
            taken += count
            bucket = Held(owners, tuple(runs[first:taken]), share)
            shards = len(content.owners[owners][0])
            if not bucket.numel <= share * shards <= _MOST_ELEMENTS:
                raise refuse(f"sections.{number}: {shards} shards of {share} elements are not {bucket.numel}")
            buckets.append(bucket)
        kinds = {kind: getattr(torch, dtype) for kind, dtype in section.kinds.items()}
        sections.append(Section(kinds, buckets))
    if taken != len(runs):
        raise refuse("runs: some are in no bucket")
    return Layout([tuple(map(tuple, ranks)) for ranks in content.owners], sections)


def check_cover(layouts: Iterable[Layout]) -> dict[str, tuple[int, ...]]:
    """Whether every element of every tensor is in one bucket, which all of its owners describe alike.

    Returns:
        the shape of every logical tensor, ``<kind>.<name>``.

    Raises:
        CheckpointError: runs of a tensor overlap or leave a gap, or layouts differ.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    described: dict[str, dict[Any, None]] = {}
    numbers: dict[Writers, int] = {}
    for layout in layouts:
        owners = [numbers.setdefault(ranks, len(numbers)) for ranks in layout.owners]
        for section in layout.sections:
            kinds = tuple(section.kinds.items())
            for bucket in section.buckets:
                base = 0
                for run in bucket.runs:
                    what = (owners[bucket.owners], bucket.share, bucket.numel, base)
                    described.setdefault(run.name, {})[run, kinds, what] = None
                    base += run.numel
    for name, found in described.items():
        by_kind: dict[str, list[Run]] = defaultdict(list)
        for run, kinds, _ in found:
            for kind, _ in kinds:
                by_kind[kind].append(run)
        for kind, runs in by_kind.items():
            if not _is_cover(runs):
                raise CheckpointError(f"checkpoint: the parts of {kind}.{name} overlap, or lack a part of it")
            shapes[f"{kind}.{name}"] = runs[0].shape
    return shapes


def _is_cover(runs: Sequence[Run]) -> bool:
    """Whether every element is in one run.

    Corners of a rectangle, with alternating signs, are the mixed differences of the function that is 1 inside and 0
    outside. Functions are equal where these are: so sums over all rectangles are compared with the whole matrix's.
    """
    rows = next((run.rows for run in runs if run.rows * run.width != math.prod(run.shape)), runs[0].rows)
    corners: Counter[tuple[int, int]] = Counter()

    def add(rectangle: Rectangle, sign: int) -> None:
        top, bottom, left, right = rectangle
        for row, of_row in ((top, sign), (bottom, -sign)):
            corners[row, left] += of_row
            corners[row, right] -= of_row

    add((0, rows, 0, math.prod(runs[0].shape) // rows), -1)
    for run in runs:
        if run.shape != runs[0].shape:
            return False
        for rectangle in run.seen_as(rows).rectangles():
            add(rectangle, 1)
    return not any(corners.values())
