"""Megabytes of text and tokens per second: parquet to shards, out of shards, and on the fly.

python benchmarks/data.py --results benchmarks/results/data.json
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from deepspeed_sdp.data import RankSampler, ShardOptions, SourceSpec, StreamedSequences, open_shards, prepare_shards
from deepspeed_sdp.data.builtin_text import builtin_documents
from deepspeed_sdp.data.tokenizer import load_tokenizer, train_tokenizer
from deepspeed_sdp.options import OptionParser

# FineWeb's documents have about so many characters, and its files so many rows in a row group.
DOCUMENT_CHARACTERS = 3000
GROUP_ROWS = 1000
SEQ_LENGTH = 2048


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=96, metavar="N", help="of text (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=32000, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="one trained before, instead of a new one")
    parser.add_argument("--results", type=Path, metavar="JSON", help="write the figures into this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.megabytes, args.vocab_size, args.tokenizer)
    for name, row in rows.items():
        print(f"{name:<44}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if args.results:
        given = "" if args.tokenizer is None else " --tokenizer FOLDER"
        about = {
            "command": f"python benchmarks/data.py --megabytes {args.megabytes} --vocab_size {args.vocab_size}{given}",
            "date": f"{date.today()}",
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0],
        }
        args.results.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, megabytes: int, vocab_size: int, trained: Path | None) -> dict[str, dict[str, float]]:
    documents = list(long_documents())
    rows: dict[str, dict[str, float]] = {}
    if trained is None:
        started, cpu = time.perf_counter(), time.process_time()
        trained = folder / "tokenizer"
        train_tokenizer(documents, vocab_size, trained)
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        rows["train the tokenizer"] = seconds
    size = sum(len(text.encode()) for text in documents)
    texts = documents * -(-megabytes * 1_000_000 // size)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet", row_group_size=GROUP_ROWS)
    spec = SourceSpec((str(folder / "a.parquet"),))
    options = ShardOptions(spec, str(trained))
    for workers, threads in ((1, 1), (1, 2), (2, 1)):
        # Read by the tokenizer in this process at each call; workers set it themselves.
        os.environ["RAYON_NUM_THREADS"] = "2"
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        out = folder / f"shards-{workers}-{threads}"
        rows[f"to shards: {workers} workers of {threads} threads"] = prepared(out, options, workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for reset in ("none", "attention"):
        rows[f"out of shards, shuffled, reset {reset}"] = read(folder / "shards-1-1", reset)
    rows["on the fly, 1 rank"] = streamed(spec, load_tokenizer(trained))
    return rows


def long_documents() -> Iterator[str]:
    """Built-in text in documents of FineWeb's length."""
    parts: list[str] = []
    for text in builtin_documents(8_000_000):
        parts.append(text)
        if sum(map(len, parts)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(parts)
            parts = []


def prepared(out: Path, options: ShardOptions, workers: int) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    manifest = prepare_shards(out, options, workers=workers)
    whole, cpu = time.perf_counter() - started, time.process_time() - cpu
    seconds, splits = manifest["seconds"], manifest["splits"].values()
    sums: dict[str, Any] = {key: sum(split[key] for split in splits) for key in ("tokens", "bytes")}
    # What other jobs on the machine leave alone. Of this process only, so not with workers.
    alone = {"tokens_per_cpu_second": sums["tokens"] / cpu} if workers == 1 else {}
    return {
        **alone,
        "tokens_per_second": sums["tokens"] / seconds,
        "megabytes_per_second": sums["bytes"] / 1e6 / seconds,
        "bytes_per_token": sums["bytes"] / sums["tokens"],
        "seconds": seconds,
        "seconds_with_start_and_checksums": whole,
    }


def read(folder: Path, reset: str) -> dict[str, float]:
    sequences = open_shards(folder).sequences("train", SEQ_LENGTH, reset)  # type: ignore[arg-type]
    batches = RankSampler(len(sequences)).batches(0, 1, 8)
    started, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < 3:
        for index in np.asarray(next(batches)):
            tokens += len(sequences[index]["input_ids"])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"tokens_per_cpu_second": tokens / cpu, "tokens_per_second": tokens / seconds}


def streamed(spec: SourceSpec, tokenizer: Any) -> dict[str, float]:
    stream = StreamedSequences(
        spec, tokenizer, SEQ_LENGTH, rank=0, world_size=1, micro_batch=8, global_batch=8, num_lanes=4
    )
    next(stream)
    started, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < 10:
        tokens += next(stream)["input_ids"].numel()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    stream.close()
    return {"tokens_per_cpu_second": tokens / cpu, "tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    main()
