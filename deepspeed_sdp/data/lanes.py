"""A lane: one of a fixed number of streams that a source is dealt to, whatever the number of ranks.

Chunk ``c`` of row group ``g`` of file ``f`` belongs to lane ``(f + g + c) % num_lanes``, in every epoch. Files, row
groups and the rows of a chunk are met in an order drawn anew for each epoch. (JSON lines are one row group, read from
front to back.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepspeed_sdp.data.encoding import DocumentEncoder, Ids
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.reading import CHUNK_ROWS, Place, group_sizes, read_chunks
from deepspeed_sdp.data.rows import Chunk, documents_of
from deepspeed_sdp.data.source import Source
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.errors import DataError

_DOCUMENTS_PER_CALL = 32


class Position(NamedTuple):
    """The first token of a lane that was not delivered. All of a lane's state.

    Attributes:
        epoch: from 0 on.
        file, group: in the order of the epoch.
        chunk: of the row group.
        row: of the chunk's documents, in the order of the epoch.
        token: of that document.
        sequences: how many the lane has delivered, in all epochs.
    """

    epoch: int = 0
    file: int = 0
    group: int = 0
    chunk: int = 0
    row: int = 0
    token: int = 0
    sequences: int = 0


class LaneSequence(NamedTuple):
    """A packed sequence ``ids [T]``, where documents begin in it, and the lane's position after it."""

    ids: Ids
    starts: npt.NDArray[np.int64]
    after: Position


@dataclass
class LaneReader:
    """What all lanes of a process share. Not for several threads."""

    source: Source
    encoder: DocumentEncoder
    seq_length: int
    num_lanes: int
    seed: int
    heldout_fraction: float
    skipped: Skipped
    chunk_rows: int = CHUNK_ROWS

    def __post_init__(self) -> None:
        self._sizes: dict[int, list[int]] = {}

    def sequences(self, lane: int, start: Position) -> Iterator[LaneSequence]:
        """Without end, from ``start`` on.

        Raises:
            DataError: the lane has no document, or a fault at which the policy is to stop.
        """
        parts: list[Ids] = []
        starts: list[int] = []
        filled, delivered = 0, start.sequences
        for position, ids in self._documents(lane, start):
            token = position.token
            while token < len(ids):
                if token == 0:
                    starts.append(filled)
                part = ids[token : token + self.seq_length - filled]
                parts.append(part)
                token += len(part)
                filled += len(part)
                if filled < self.seq_length:
                    break
                delivered += 1
                after = position._replace(token=token, sequences=delivered)
                if token == len(ids):
                    after = after._replace(row=position.row + 1, token=0)
                yield LaneSequence(np.concatenate(parts), np.array(starts, dtype=np.int64), after)
                parts, starts, filled = [], [], 0

    def _documents(self, lane: int, start: Position) -> Iterator[tuple[Position, Ids]]:
        for epoch in count(start.epoch):
            found = False
            begin = start if epoch == start.epoch else Position(epoch)
            for position, ids in self._epoch(lane, begin):
                found = True
                yield position, ids
            if not found and begin[1:6] == Position()[1:6]:
                raise DataError(
                    f"--num_lanes: got {self.num_lanes}, of which lane {lane} finds no document in "
                    f"{', '.join(self.source.spec.paths)}; takes fewer lanes, or more text"
                )

    def _epoch(self, lane: int, start: Position) -> Iterator[tuple[Position, Ids]]:
        order = self._permutation(len(self.source.files), start.epoch)
        for place in range(start.file, len(order)):
            begin = start if place == start.file else Position(start.epoch, place)
            for position, chunk in self._chunks(lane, int(order[place]), begin):
                within = start[4:6] if position[:4] == start[:4] else (0, 0)
                yield from self._chunk(int(order[place]), chunk, position, *within)

    def _chunks(self, lane: int, file: int, start: Position) -> Iterator[tuple[Position, Chunk]]:
        """Own chunks of a file."""
        data, spec = self.source.files[file], self.source.spec
        groups: list[int] | None = None
        if data.kind == "parquet":
            order = self._permutation(len(self._group_sizes(file)), start.epoch, file)
            groups = [int(group) for group in order if self._has_own(lane, file, int(group))]
        begin = Place(start.group, start.chunk)
        for chunk in read_chunks(data, spec, self.skipped, begin, groups, self.chunk_rows):
            if (file + chunk.group + chunk.number) % self.num_lanes == lane:
                group = 0 if groups is None else groups.index(chunk.group)
                yield Position(start.epoch, start.file, group, chunk.number), chunk

    def _chunk(
        self, file: int, chunk: Chunk, position: Position, start_row: int, start_token: int
    ) -> Iterator[tuple[Position, Ids]]:
        data, spec = self.source.files[file], self.source.spec
        texts = [text for text, _ in documents_of(chunk, data, spec, self.skipped)]
        texts = [text for text in texts if not is_heldout(self.encoder.text(text), self.heldout_fraction)]
        order = self._permutation(len(texts), position.epoch, file, chunk.group, chunk.number)
        for first in range(start_row, len(order), _DOCUMENTS_PER_CALL):
            rows = order[first : first + _DOCUMENTS_PER_CALL]
            for row, ids in enumerate(self.encoder([texts[r] for r in rows]), start=first):
                yield position._replace(row=row, token=start_token if row == start_row else 0), ids

    def _has_own(self, lane: int, file: int, group: int) -> bool:
        chunks = -(-self._group_sizes(file)[group] // self.chunk_rows)
        return (lane - file - group) % self.num_lanes < chunks

    def _group_sizes(self, file: int) -> Sequence[int]:
        if file not in self._sizes:
            self._sizes[file] = group_sizes(self.source.files[file], self.source.spec, self.skipped)
        return self._sizes[file]

    def _permutation(self, length: int, *key: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self.seed, *key)).permutation(length)
