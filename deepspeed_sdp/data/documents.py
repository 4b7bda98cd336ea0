"""The documents of a source one after another, and the blocks of them that workers take."""

import copy
from collections.abc import Iterator
from dataclasses import replace

from deepspeed_sdp.data.encoding import Document
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.reading import CHUNK_ROWS, START, Place, group_sizes, read_chunks
from deepspeed_sdp.data.rows import Chunk, documents_of
from deepspeed_sdp.data.shard_worker import Task
from deepspeed_sdp.data.source import Source

# A row group up to so many rows is read by whoever tokenises it; a larger one is handed over in chunks.
_ROWS_PER_TASK = 4 * CHUNK_ROWS


def stream_documents(source: Source, skipped: Skipped) -> Iterator[tuple[Document, str]]:
    """``(document, place)`` in the order of the files; holds a chunk of rows at a time.

    Raises:
        DataError: as the fault policy says.
    """
    for file in source.files:
        for chunk in read_chunks(file, source.spec, skipped):
            for text, row in documents_of(chunk, file, source.spec, skipped):
                yield text, f"{file.path}: {row}"


def stream_tasks(source: Source, start: tuple[int, Place] = (0, START)) -> Iterator[Task]:
    """All of a source as tasks, in order, from where ``Task.after`` points.

    Raises:
        DataError: as the fault policy says.
    """
    skipped = Skipped()
    for number in range(start[0], len(source.files)):
        for task in _file_tasks(source, number, skipped, start[1] if number == start[0] else START):
            yield replace(task, skipped=copy.deepcopy(skipped))
            skipped.clear()
    if skipped.counts:
        yield Task(len(source.files), START, Chunk(0, 0, 0, []), skipped)


def _file_tasks(source: Source, number: int, skipped: Skipped, place: Place) -> Iterator[Task]:
    file, spec = source.files[number], source.spec
    if file.kind != "parquet":
        for chunk in read_chunks(file, spec, skipped, place):
            yield Task(number, Place(0, chunk.number), chunk)
        return
    for group, size in enumerate(group_sizes(file, spec, skipped)):
        if group < place.group:
            continue
        index = place.number if group == place.group else 0
        if size <= _ROWS_PER_TASK:
            yield Task(number, Place(group))
        elif index * CHUNK_ROWS < size:
            for chunk in read_chunks(file, spec, skipped, Place(0, index), [group]):
                yield Task(number, Place(group, chunk.number), chunk)
