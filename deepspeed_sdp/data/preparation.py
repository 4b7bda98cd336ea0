"""The work of making shards, in a folder that is not finished yet."""

import contextlib
import json
import platform
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from deepspeed_sdp.data import manifest as manifests
from deepspeed_sdp.data.documents import stream_documents, stream_tasks
from deepspeed_sdp.data.encoding import DocumentEncoder
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.reading import START, Place
from deepspeed_sdp.data.shard_options import ShardOptions
from deepspeed_sdp.data.shard_worker import Block, ShardWorker, Task, start_worker, work
from deepspeed_sdp.data.shard_writer import SplitWriter, file_sizes
from deepspeed_sdp.data.source import Source
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from deepspeed_sdp.errors import DataError
from deepspeed_sdp.files import remove_unfinished, write_text
from deepspeed_sdp.schemas import Count, Schema, read_object

PROGRESS = "progress.json"
LOCK = "lock"
_SECONDS_BETWEEN_SYNCS = 10.0
_TOKENIZER_CHARACTERS = 16_000_000


class _Counts(Schema):
    tokens: Count
    documents: Count
    bytes: Count
    characters: Count


class _SplitCounts(Schema):
    train: _Counts
    heldout: _Counts


class _Progress(Schema):
    fingerprint: str
    counts: _SplitCounts
    file: Count
    place: Annotated[list[Count], Field(min_length=2, max_length=2)]
    skipped: dict[str, manifests.Skips]
    heldout_documents_left_out: Count
    seconds: float = Field(ge=0)


class Preparation:
    """Of one staging folder, which nobody else uses."""

    def __init__(
        self,
        staging: Path,
        options: ShardOptions,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None,
        request: dict[str, Any],
        skipped: Skipped,
        progress: bool,
    ) -> None:
        self.staging = staging
        self.options = options
        self.source = source
        self.request = request
        self.progress = progress
        self.fingerprint = manifests.fingerprint(request)
        state = self._saved()
        _clear(staging, all_of_it=not state)
        self.skipped = Skipped.from_json(state.get("skipped", {}))
        self.skipped.merge(skipped)
        self.seconds = float(state.get("seconds", 0.0))
        self.dropped = int(state.get("heldout_documents_left_out", 0))
        self.next = (state["file"], Place(*state["place"])) if state else (0, START)
        if not state:
            self._make_tokenizer(tokenizer)
        self.encoder = DocumentEncoder(load_tokenizer(staging / manifests.TOKENIZER), options.add_bos)
        counts = state.get("counts", {})
        self.train = self._writer("train", options.max_tokens, counts)
        self.heldout = self._writer("heldout", options.max_heldout_tokens, counts)
        self._done = self._state()

    def run(self, workers: int) -> None:
        """To the end, where the manifest is written."""
        started = synced = time.monotonic()
        before = self.seconds
        try:
            with self._bar() as bar:
                tasks = stream_tasks(self.source, self.next)
                for task, block in self._blocks(() if self.train.full else tasks, workers):
                    self._take(block)
                    self.next = task.after
                    self._done = self._state()
                    bar.update(self.train.counts["tokens"] - bar.n)
                    bar.set_postfix(documents=self.train.counts["documents"], refresh=False)
                    if self.train.full:
                        break
                    if time.monotonic() - synced > _SECONDS_BETWEEN_SYNCS:
                        self.seconds = before + time.monotonic() - started
                        self._save()
                        synced = time.monotonic()
        except BaseException:
            # What is done so far is kept; the disk may be what failed.
            with contextlib.suppress(OSError):
                self.seconds = before + time.monotonic() - started
                self._save()
            raise
        self.seconds = before + time.monotonic() - started
        self._save()
        self._finish()

    def _take(self, block: Block) -> None:
        self.skipped.merge(block.skipped)
        self.train.append(block.train)
        before = self.heldout.counts["documents"]
        if not self.heldout.full:
            self.heldout.append(block.heldout)
        self.dropped += len(block.heldout.lengths) - (self.heldout.counts["documents"] - before)

    def _blocks(self, tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Block]]:
        arguments = (
            self.source, self.staging / manifests.TOKENIZER, self.options.heldout_fraction, self.options.add_bos,
        )  # fmt: skip
        if workers == 1:
            worker = ShardWorker(*arguments)
            yield from ((task, worker(task)) for task in tasks)
            return
        # Not forked from here: this process may have threads.
        context = get_context("forkserver")
        context.set_forkserver_preload(["deepspeed_sdp.data.shard_worker"])
        pool = ProcessPoolExecutor(workers, context, start_worker, arguments)
        try:
            yield from _in_order(pool, iter(tasks), 2 * workers + 2)
        except BrokenProcessPool:
            raise DataError("a worker process was killed (out of memory?); fewer --workers need less") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self) -> None:
        self.train.close()
        self.heldout.close()
        if not self.train.counts["tokens"]:
            raise self._no_text(self.skipped)
        if self.options.heldout_fraction and not self.heldout.counts["tokens"]:
            raise DataError(
                f"--heldout_fraction: got {self.options.heldout_fraction}, by which none of "
                f"{self.train.counts['documents']} documents is held out; takes a larger share, or more documents"
            )
        write_text(self.staging / manifests.NAME, json.dumps(self._manifest(), indent=2) + "\n")

    def _manifest(self) -> dict[str, Any]:
        encoder = self.encoder
        return {
            "format": manifests.FORMAT,
            "fingerprint": self.fingerprint,
            "request": self.request,
            "commit": self.source.commit,
            "tokenizer": {
                "sha256": tokenizer_hash(encoder.tokenizer),
                "from": self.options.tokenizer or "trained on the first documents",
                "vocab_size": encoder.vocab_size,
                "eos_token_id": encoder.eos_token_id,
                "bos_token_id": encoder.prefix[0] if encoder.prefix else None,
            },
            "dtype": encoder.dtype.str,
            "shard_tokens": self.options.shard_tokens,
            "splits": {split.split: {**split.counts, "shards": split.shards} for split in (self.train, self.heldout)},
            "heldout": {
                "rule": "first 8 bytes of the SHA-256 of a document's text, over 2^64, below the fraction",
                "fraction": self.options.heldout_fraction,
                "documents_left_out": self.dropped,
            },
            "skipped": self.skipped.to_json(),
            "seconds": round(self.seconds, 2),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("transformers", "tokenizers", "datasets", "pyarrow")},
            },
            "files": manifests.list_files(self.staging, but={PROGRESS, LOCK}),
        }

    def _make_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        folder = self.staging / manifests.TOKENIZER
        if tokenizer is None:
            assert self.options.train_tokenizer is not None
            train_tokenizer(self._first_documents(), self.options.train_tokenizer, folder)
        else:
            tokenizer.save_pretrained(folder)

    def _first_documents(self) -> list[str]:
        texts, size = [], 0
        # What is skipped here is met, and counted, again.
        skipped = Skipped()
        for text, _ in stream_documents(self.source, skipped):
            if not isinstance(text, str):
                raise DataError("--train_tokenizer: the source is tokenised; takes text, or --tokenizer for what it is")
            if not is_heldout(text, self.options.heldout_fraction):
                texts.append(text)
                size += len(text)
            if size >= _TOKENIZER_CHARACTERS:
                break
        if not texts:
            raise self._no_text(skipped)
        return texts

    def _no_text(self, skipped: Skipped) -> DataError:
        about = "; ".join(f"{count} x {reason}" for reason, count in sorted(skipped.counts.items()))
        return DataError(f"{', '.join(self.source.spec.paths)}: holds no text{about and f' (skipped: {about})'}")

    def _writer(self, split: str, limit: int | None, counts: dict[str, dict[str, int]]) -> SplitWriter:
        return SplitWriter(self.staging, split, self.encoder.dtype, self.options.shard_tokens, limit, counts.get(split))

    def _bar(self) -> "tqdm[Any]":
        done = self.train.counts["tokens"]
        return tqdm(
            total=self.options.max_tokens, initial=done, unit=" tokens", unit_scale=True, desc="tokenize",
            disable=not self.progress,
        )  # fmt: skip

    def _saved(self) -> dict[str, Any]:
        """Where an earlier process stopped, if all is there that it wrote until then; or nothing."""
        try:
            state = read_object(self.staging / PROGRESS, _Progress, DataError)
            if state["fingerprint"] != self.fingerprint or state["file"] > len(self.source.files):
                return {}
            tokenizer = load_tokenizer(self.staging / manifests.TOKENIZER)
        except DataError:
            return {}
        itemsize = DocumentEncoder(tokenizer).dtype.itemsize
        sizes: dict[str, int] = {}
        for split, counts in state["counts"].items():
            if counts["tokens"] > len(list(self.staging.glob(f"{split}-*.bin"))) * self.options.shard_tokens:
                return {}
            sizes |= file_sizes(split, counts, self.options.shard_tokens, itemsize)
        there = {path.name: path.stat().st_size for path in self.staging.iterdir()}
        return state if all(there.get(name, -1) >= size for name, size in sizes.items()) else {}

    def _state(self) -> dict[str, Any]:
        """Between two blocks: what was made of those before."""
        return {
            "fingerprint": self.fingerprint,
            "counts": {"train": dict(self.train.counts), "heldout": dict(self.heldout.counts)},
            "file": self.next[0],
            "place": list(self.next[1]),
            "skipped": self.skipped.to_json(),
            "heldout_documents_left_out": self.dropped,
        }

    def _save(self) -> None:
        """The state after the last whole block; what lies on disk of the next one is cut off by who goes on."""
        self.train.sync()
        self.heldout.sync()
        write_text(self.staging / PROGRESS, json.dumps({**self._done, "seconds": self.seconds}, indent=2) + "\n")


def _in_order(pool: ProcessPoolExecutor, tasks: Iterator[Task], ahead: int) -> Iterator[tuple[Task, Block]]:
    pending: deque[tuple[Task, Future[Block]]] = deque()
    fault = None
    while True:
        try:
            while len(pending) <= ahead and fault is None:
                task = next(tasks)
                pending.append((task, pool.submit(work, task)))
        except StopIteration:
            ahead = -1
        except DataError as error:
            # Raised in its turn: what is wanted may end before it.
            fault = error
        if not pending:
            break
        first, future = pending.popleft()
        yield first, future.result()
    if fault is not None:
        raise fault


def _clear(staging: Path, all_of_it: bool) -> None:
    """Remove what an earlier process left: all of it, or what it was writing when it was killed."""
    remove_unfinished(staging)
    for entry in staging.iterdir():
        if not (all_of_it or entry.name.startswith(".")):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
