"""The token files of one split, written in order, and continued where an earlier process was stopped."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from deepspeed_sdp.data.shard_worker import Documents

COUNTS = ("tokens", "documents", "bytes", "characters")
_OFFSET_BYTES = 8


def shard_name(split: str, number: int) -> str:
    """File name of one shard."""
    return f"{split}-{number:05d}.bin"


def index_name(split: str) -> str:
    """File name of a split's index: where its documents begin, int64 in tokens from the start of the split."""
    return f"{split}-documents.idx"


def shards_of(tokens: int, shard_tokens: int) -> int:
    """Files that a split takes; only the last may be short."""
    return -(-tokens // shard_tokens)


def file_sizes(split: str, counts: Mapping[str, int], shard_tokens: int, itemsize: int) -> dict[str, int]:
    """Name and bytes of every file of a split of so many ``tokens`` and ``documents``."""
    whole, rest = divmod(counts["tokens"], shard_tokens)
    tokens = [shard_tokens] * whole + [rest] * bool(rest)
    sizes = {shard_name(split, number): count * itemsize for number, count in enumerate(tokens)}
    return {**sizes, index_name(split): counts["documents"] * _OFFSET_BYTES}


class SplitWriter:
    """Appends documents to ``{split}-00000.bin``, ... of ``shard_tokens`` tokens each, up to ``limit`` tokens.

    Args:
        counts: what :meth:`sync` returned; whatever was written after that is cut off.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype[Any],
        shard_tokens: int,
        limit: int | None,
        counts: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.limit = limit
        self.counts = dict(counts) if counts else dict.fromkeys(COUNTS, 0)
        self._cut_back()
        self._index = self._append_to(index_name(split))
        self._shard: IO[bytes] | None = None

    @property
    def full(self) -> bool:
        """No more fits below the limit."""
        return self.limit is not None and self.counts["tokens"] >= self.limit

    @property
    def shards(self) -> int:
        """Files so far; only the last may be short."""
        return shards_of(self.counts["tokens"], self.shard_tokens)

    def append(self, documents: Documents) -> None:
        """Write as many as fit; the last one is cut at the limit, where ``bytes`` and ``characters`` count it whole."""
        room = None if self.limit is None else self.limit - self.counts["tokens"]
        ends = np.cumsum(documents.lengths)
        starts = ends - documents.lengths
        count = len(starts) if room is None else int(np.searchsorted(starts, room))
        if not count:
            return
        tokens = documents.tokens[:room]
        self._index.write((starts[:count] + self.counts["tokens"]).astype("<i8").tobytes())
        written = 0
        while written < len(tokens):
            number, used = divmod(self.counts["tokens"], self.shard_tokens)
            if self._shard is None or used == 0:
                self._open(number)
            assert self._shard is not None
            part = tokens[written : written + self.shard_tokens - used]
            self._shard.write(part.astype(self.dtype, copy=False).tobytes())
            self.counts["tokens"] += len(part)
            written += len(part)
        self.counts["documents"] += count
        self.counts["bytes"] += int(documents.bytes[:count].sum())
        self.counts["characters"] += int(documents.characters[:count].sum())

    def sync(self) -> dict[str, int]:
        """Everything on disk; the counts from which to go on."""
        for file in filter(None, (self._index, self._shard)):
            if file.closed:  # an interrupt came between two shards; the first of them is on disk
                continue
            file.flush()
            os.fsync(file.fileno())
        return dict(self.counts)

    def close(self) -> None:
        """On disk, and closed."""
        self.sync()
        self._index.close()
        if self._shard is not None:
            self._shard.close()

    def _open(self, number: int) -> None:
        if self._shard is not None:
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
        self._shard = self._append_to(shard_name(self.split, number))

    def _append_to(self, name: str) -> IO[bytes]:
        return open(self.folder / name, "ab")

    def _cut_back(self) -> None:
        sizes = file_sizes(self.split, self.counts, self.shard_tokens, self.dtype.itemsize)
        for path in self.folder.glob(f"{self.split}-*.bin"):
            if path.name not in sizes:
                path.unlink()
        for name, size in sizes.items():
            with open(self.folder / name, "ab") as file:
                if file.tell() < size:
                    raise ValueError(f"{self.folder / name} is shorter than was written")
                file.truncate(size)
