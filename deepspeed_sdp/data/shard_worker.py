"""One block of documents, read, checked, held out and tokenised: in a worker process, or in this one."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepspeed_sdp.data.encoding import Document, DocumentEncoder, Ids
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.reading import Place, read_chunks
from deepspeed_sdp.data.rows import Chunk, documents_of
from deepspeed_sdp.data.source import Source
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.data.tokenizer import load_tokenizer

# Documents per call of the tokenizer. Longer calls only hold more encodings in memory.
_BATCH = 256


@dataclass(frozen=True)
class Task:
    """A block of rows: ``chunk`` where they are read already, else the whole row group at ``place``.

    ``skipped`` is what was passed over between the task before and this one.
    """

    file: int
    place: Place
    chunk: Chunk | None = None
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def after(self) -> tuple[int, Place]:
        """File and place where the next task begins."""
        if self.chunk is None:
            return self.file, Place(self.place.group + 1)
        return self.file, Place(self.place.group, self.place.number + 1)


@dataclass
class Documents:
    """Tokenised documents: ids one after another, and per document ``[n]`` its sizes.

    Attributes:
        tokens: ids ``[sum(lengths)]``.
        lengths, bytes, characters: int64 ``[n]``; in tokens, in UTF-8 and in code points.
    """

    tokens: Ids
    lengths: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    characters: npt.NDArray[np.int64]


@dataclass
class Block:
    """What became of a task."""

    train: Documents
    heldout: Documents
    skipped: Skipped = field(default_factory=Skipped)


class ShardWorker:
    """Does tasks. The same task gives the same block in every process."""

    def __init__(self, source: Source, tokenizer_folder: Path, heldout_fraction: float, add_bos: bool) -> None:
        self.source = source
        self.heldout_fraction = heldout_fraction
        self.encoder = DocumentEncoder(load_tokenizer(tokenizer_folder), add_bos)

    def __call__(self, task: Task) -> Block:
        """Raises :class:`DataError` where the fault policy is to stop."""
        skipped = Skipped()
        skipped.merge(task.skipped)
        documents = self._documents(task, skipped)
        texts = [self.encoder.text(document) for document in documents]
        out = [is_heldout(text, self.heldout_fraction) for text in texts]
        train, heldout = (
            self._encode(
                [document for document, flag in zip(documents, out, strict=True) if flag == wanted],
                [text for text, flag in zip(texts, out, strict=True) if flag == wanted],
            )
            for wanted in (False, True)
        )
        return Block(train, heldout, skipped)

    def _documents(self, task: Task, skipped: Skipped) -> list[Document]:
        if task.chunk is not None and not task.chunk.rows:
            return []
        file, spec = self.source.files[task.file], self.source.spec
        read = [task.chunk] if task.chunk is not None else read_chunks(file, spec, skipped, groups=[task.place.group])
        return [document for chunk in read for document, _ in documents_of(chunk, file, spec, skipped)]

    def _encode(self, documents: list[Document], texts: list[str]) -> Documents:
        starts = range(0, len(documents), _BATCH)
        ids = [row for start in starts for row in self.encoder(documents[start : start + _BATCH])]
        return Documents(
            np.concatenate(ids) if ids else np.zeros(0, self.encoder.dtype),
            np.array([len(row) for row in ids], dtype=np.int64),
            np.array([len(text.encode()) for text in texts], dtype=np.int64),
            np.array([len(text) for text in texts], dtype=np.int64),
        )


_worker: ShardWorker | None = None


def start_worker(*arguments: Any) -> None:
    """Of a worker process, once."""
    global _worker
    # The process that hands out the work ends it, also where an interrupt reaches the whole group of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One worker per core is faster than workers of several threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = ShardWorker(*arguments)


def _end_with_parent() -> None:
    # A killed parent leaves its workers waiting for tasks. Theirs is the process that made the pool, and not the server
    # that they were forked from, which lives as long as they do.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(task: Task) -> Block:
    """In a worker process."""
    assert _worker is not None
    return _worker(task)
