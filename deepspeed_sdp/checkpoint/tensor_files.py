"""Tensors of a checkpoint in safetensors files, one per rank, written front to back: nothing is ever unpickled."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from deepspeed_sdp.checkpoint import file_writer
from deepspeed_sdp.checkpoint.layout import Found, Layout, layout_file, read_layout, tensor_key
from deepspeed_sdp.checkpoint.runs import Entry, Run, common, whole
from deepspeed_sdp.checkpoint.source import Read, Source
from deepspeed_sdp.errors import CheckpointError, OutputError
from deepspeed_sdp.files import fsync

_OPEN_FILES = 256

# Names of safetensors.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def tensor_file(rank: int) -> str:
    """Name of the file of a rank's tensors."""
    return f"tensors-{rank:05d}.safetensors"


def header(layout: Layout, rank: int) -> bytes:
    """What a rank's file begins with; the tensors follow.

    Raises:
        CheckpointError: a tensor of any rank has a dtype that files do not hold.
    """
    for held in layout.sections:
        for kind, dtype in held.kinds.items():
            if dtype not in _DTYPES:
                name = held.buckets[0].runs[0].name
                takes = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
                raise CheckpointError(
                    f"checkpoint: {kind}.{name} is {str(dtype).removeprefix('torch.')}; takes {takes}"
                )
    tensors: dict[str, Any] = {}
    end = 0
    for copy, section, kind, dtype, numel in layout.tensors(rank):
        start, end = end, end + numel * dtype.itemsize
        described = {"dtype": _DTYPES[dtype], "shape": [numel], "data_offsets": [start, end]}
        tensors[tensor_key(copy, section, kind)] = described
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Streamed:
    """A file that is written while its content is made: no more of it is in memory.

    The content is taken to its end whatever happens to the file, as making it may be collective.
    """

    def __init__(self, content: Iterable[memoryview]) -> None:
        self._content = iter(content)

    def write(self, path: Path) -> dict[str, Any]:
        """Write and fsync it; what the manifest says of it.

        Raises:
            OSError: it cannot be written.
        """
        error: OSError | None = None
        digest, nbytes = hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                for piece in self._content:
                    file.write(piece)
                    digest.update(piece)
                    nbytes += len(piece)
            fsync(path)
        except OSError as reason:
            error = reason
        for _ in self._content:
            pass
        if error is not None:
            raise error
        return {"bytes": nbytes, "sha256": digest.hexdigest()}


class Snapshot:
    """A file's content as it is now, in memory that a process of its own writes from later, beside the training."""

    def __init__(self, content: Iterable[memoryview]) -> None:
        self._error: OSError | None = None
        content = iter(content)
        try:
            # Its memory is free when nothing refers to it any more.
            self._memory = os.fdopen(self._open(), "w+b", buffering=0)
            # Not through a map: each of its new pages would be a fault, which takes as long again.
            for piece in content:
                while piece:
                    piece = piece[self._memory.write(piece) :]
        except OSError as error:
            self._error = error
        for _ in content:
            pass

    def _open(self) -> int:
        return os.memfd_create("checkpoint")

    def write(self, path: Path) -> dict[str, Any]:
        """See :meth:`Streamed.write`.

        Raises:
            OutputError: the process that writes is gone.
        """
        if self._error is not None:
            raise self._error
        with self._memory as memory:
            command = [sys.executable, "-I", "-S", file_writer.__file__, str(memory.fileno()), str(path)]
            done = subprocess.run(command, pass_fds=(memory.fileno(),), capture_output=True, text=True, check=False)
        if done.returncode:
            code = done.returncode
            how = (
                f"killed by signal {-code}"
                if code < 0
                else (done.stderr.strip().splitlines() or [f"gone ({code})"])[-1]
            )
            raise OutputError(f"cannot write {path}: the process that writes it is {how}")
        answer: dict[str, Any] = json.loads(done.stdout)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), str(path))
        return answer


class Placed(Snapshot):
    """A file's content as it is now, in a file without a name in ``folder``, which :meth:`write` gives it one.

    In memory where the folder is; a process that dies leaves nothing.
    """

    def __init__(self, content: Iterable[memoryview], folder: Path) -> None:
        self._folder = folder
        super().__init__(content)

    def _open(self) -> int:
        return os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o600)

    def write(self, path: Path) -> dict[str, Any]:
        """Let it appear at ``path``, on the same file system; what the manifest says of it.

        Raises:
            OSError: it cannot be.
        """
        if self._error is not None:
            raise self._error
        with self._memory as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            nbytes = file.tell()
            folder = os.open(path.parent, os.O_PATH)
            try:
                # A descriptor of the folder makes Python follow the link to the file without a name.
                os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder)
            finally:
                os.close(folder)
        return {"bytes": nbytes, "sha256": digest}


class Stored(NamedTuple):
    """A tensor in the file of ``rank``."""

    rank: int
    key: str
    numel: int
    dtype: torch.dtype


class TensorFiles(Source):
    """Reads what ranks wrote: layouts when they are needed, no more of a file than is asked for.

    Args:
        folder: of the checkpoint.
        workers: the worker of every rank that wrote it.
        lost: files that cannot be used; what was in them is read from copies.
        first: the worker whose layout is looked into first.
    """

    def __init__(self, folder: Path, workers: Sequence[int], lost: Container[str] = (), first: int = 0) -> None:
        self._folder = folder
        self._workers = workers
        every = sorted(set(workers))
        first = first if first in every else 0
        self._order = [*every[every.index(first) :], *every[: every.index(first)]] if first in every else every
        self._lost = lost
        self._layouts: dict[int, Layout] = {}
        self._open = lru_cache(_OPEN_FILES)(self._open_file)

    def layout(self, worker: int) -> Layout:
        """The layout of a worker.

        Raises:
            CheckpointError: see :func:`read_layout`; or it names ranks that there are not.
        """
        if worker not in self._layouts:
            found = read_layout(self._folder, worker)
            if any(rank >= len(self._workers) for ranks in found.owners for copy in ranks for rank in copy):
                raise CheckpointError(
                    f"checkpoint: {self._folder / layout_file(worker)}: owners: there is no such rank"
                )
            self._layouts[worker] = found
        return self._layouts[worker]

    def layouts(self) -> Iterator[Layout]:
        """Those of all workers that are not lost, one at a time."""
        for worker in self._order:
            if layout_file(worker) not in self._lost:
                yield self.layout(worker)

    def is_lost(self, rank: int) -> bool:
        """Whether what a rank wrote cannot be used."""
        return tensor_file(rank) in self._lost or layout_file(self._workers[rank]) in self._lost

    def nbytes(self, rank: int) -> int:
        """Bytes of tensors that the layout says are in a rank's file."""
        return sum(numel * dtype.itemsize for *_, dtype, numel in self.layout(self._workers[rank]).tensors(rank))

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """A whole logical tensor, which there is.

        Raises:
            CheckpointError: a part of it cannot be read.
        """
        found = self._find(kind, name)
        assert found is not None
        shape, dtype = found
        value = torch.empty(shape, dtype=dtype)
        self.fill([Entry(kind, (whole(name, shape),), value.view(-1))])
        return value

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        found = self._find(kind, name)
        return found and found[0]

    def _find(self, kind: str, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        for layout in self.layouts():
            for found in layout.found.get(name, ()):
                if kind in layout.sections[found.section].kinds:
                    return found.run.shape, layout.sections[found.section].kinds[kind]
        return None

    def held(self, kind: str, wanted: Run) -> Iterator[tuple[Run, Read]]:
        seen = set()
        for layout in self.layouts():
            for found in layout.found.get(wanted.name, ()):
                run = found.run
                if wanted.is_apart(run) or run in seen or kind not in layout.sections[found.section].kinds:
                    continue
                seen.add(run)
                _, there, shared = common(wanted, run)
                if not shared:
                    continue
                bucket = layout.sections[found.section].buckets[found.bucket]
                # Where elements of the run, counted as in its columns, are in the bucket's flat vector.
                shift = found.base - run.start
                low = min(top * there.width + left for top, _, left, _ in shared) - there.column + shift
                high = max((bottom - 1) * there.width + right for _, bottom, _, right in shared) - there.column + shift
                for shard in range(low // bucket.share, (high - 1) // bucket.share + 1):
                    begin = shard * bucket.share
                    start, stop = max(low, begin) - shift, min(high, begin + bucket.share) - shift
                    part = Run(run.name, run.shape, run.rows, run.column, run.width, start, stop)
                    yield part, self._reader(kind, layout, found, shard)

    def _reader(self, kind: str, layout: Layout, found: Found, shard: int) -> Read:
        """Reads elements of a run out of one shard of its bucket."""
        bucket = layout.sections[found.section].buckets[found.bucket]
        ranks = [of_copy[shard] for of_copy in layout.owners[bucket.owners]]
        copy, rank = next(((copy, rank) for copy, rank in enumerate(ranks) if not self.is_lost(rank)), (-1, -1))
        if copy < 0:
            files = " and ".join(map(tensor_file, ranks))
            raise CheckpointError(f"checkpoint: a part of {kind}.{found.run.name} is in {files} alone")
        # Of the worker whose rank wrote it, which may have other buckets beside this one.
        own = self.layout(self._workers[rank])
        place = next((f for f in own.found.get(found.run.name, ()) if f.run == found.run), None)
        if place is None or kind not in own.sections[place.section].kinds:
            name = layout_file(self._workers[rank])
            raise CheckpointError(f"checkpoint: {self._folder / name}: lacks a part of {kind}.{found.run.name}")
        starts, stops = own.shards(place.section, copy, rank)
        key, numel = tensor_key(copy, place.section, kind), int(stops[-1])
        dtype = own.sections[place.section].kinds[kind]
        shift = int(starts[place.bucket]) + found.base - found.run.start - shard * bucket.share

        stored = Stored(rank, key, numel, dtype)
        return lambda start, stop: self.elements(stored, start + shift, stop + shift)

    def elements(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """Elements of what a rank wrote, flat, on the CPU.

        Raises:
            CheckpointError: they cannot be read.
        """
        path = self._folder / tensor_file(stored.rank)
        try:
            found = self._open(path).get_slice(stored.key)
            if (found.get_shape(), found.get_dtype()) != ([stored.numel], _DTYPES[stored.dtype]):
                raise CheckpointError(
                    f"checkpoint: {path} has {found.get_shape()} {found.get_dtype()} of {stored.key}; the layout says "
                    f"{[stored.numel]} {_DTYPES[stored.dtype]}"
                )
            values: torch.Tensor = found[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None
        if len(values) != stop - start:
            raise CheckpointError(f"checkpoint: {path} lacks a part of {stored.key}")
        return values

    @staticmethod
    def _open_file(path: Path) -> Any:
        file: Any = safe_open(path, framework="pt")
        return file.__enter__()
