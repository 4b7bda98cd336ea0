"""Validation loss of the full model at equal FLOPs and equal tokens: dense, regularised, and SDP in all its options.

    python -m benchmarks.quality.run --groups main defaults gap
    python -m benchmarks.quality.tables

One process and one thread simulate all workers (``tests/benchmarks/test_quality.py``: as the engine trains). Every
finished training is a line of ``--output`` at once; what stands there is not run again, so a sweep can be stopped and
resumed at any time. The learning rate of every row of the main table is tuned alike: from ``--lr`` on by factors of
2 towards the better side, at equal FLOPs with seed 0. ``--quick`` runs a few rows of a tiny model, to see them run.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.quality.methods import GROUPS, ROWS, SIZES, Row
from benchmarks.quality.training import Method, Size, train, with_sdp
from deepspeed_sdp.data import ShardOptions, SourceSpec, open_shards, prepare_shards
from deepspeed_sdp.options import OptionParser

_TEXT_MB, _HELDOUT = 10, 0.02
# Every fourth sequence of what is held out: 31 thousand tokens.
_HELDOUT_STRIDE = 4
QUICK = ("dense", "forward, neurons, 1/2", "forward, neurons, 1/2; last 10 percent dense", "backward, blocks, 1/2")
Result = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["main", "defaults", "gap"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="these rows alone, by name")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row, with seeds from 0 on")
    parser.add_argument("--equal", nargs="+", choices=("flops", "tokens"), default=["flops", "tokens"])
    parser.add_argument("--lr", type=float, default=4e-3, help="where tuning begins")
    parser.add_argument("--no_tuning", action="store_true", help="every row with --lr: for what is too large to tune")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    parser.add_argument("--data", type=Path, default=Path("runs/quality/data"), help="where the prepared text lies")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds: got {args.seeds}; takes 1 or more")
    if not args.lr > 0:
        parser.error(f"--lr: got {args.lr:g}; takes a number above 0")
    if args.quick:
        args.size, args.seeds, args.rows = "smoke", 1, args.rows or list(QUICK)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sweep = Sweep(args, load(args))
    for row in [row for row in ROWS.values() if (row.name in args.rows if args.rows else row.group in args.groups)]:
        sweep.run(row)


class Text(NamedTuple):
    """Sequences int32 ``[n, T]``."""

    train: npt.NDArray[np.int32]
    heldout: npt.NDArray[np.int32]


def load(args: argparse.Namespace) -> Text:
    size = SIZES[args.size]
    options = ShardOptions(SourceSpec((f"builtin:{_TEXT_MB}",)), train_tokenizer=size.vocab, heldout_fraction=_HELDOUT)
    prepare_shards(args.data, options, workers=1, overwrite="outdated")
    splits = [open_shards(args.data).sequences(split, size.length) for split in ("train", "heldout")]
    return Text(*(split.ids(range(len(split))).astype(np.int32) for split in splits))


class Sweep:
    """Runs what is missing in the file of results."""

    def __init__(self, args: argparse.Namespace, text: Text) -> None:
        self.args, self.sequences, self.size = args, text, SIZES[args.size]
        # Trainings on another text are others: the built-in one follows the packages that are installed.
        self.text = hashlib.sha256(b"".join(text)).hexdigest()[:16]

    def run(self, row: Row) -> None:
        """All trainings of a row: its tuning, its seeds, and those at equal tokens."""
        lr = self.tuned_lr(ROWS[row.like] if row.like else row)
        for equal in self.args.equal if row.equal_tokens else ["flops"]:
            for seed in range(self.args.seeds):
                self.result(row, equal, lr, seed)

    def tuned_lr(self, row: Row) -> float:
        """The best of a grid with factor 2 around ``--lr``, inside it."""
        best, step = self.args.lr, 2.0
        if self.args.quick or self.args.no_tuning:
            return float(best)
        losses = {best: self.loss(row, best)}
        if self.loss(row, best / step) < losses[best]:
            step = 1 / step
        while True:
            following = best * step
            if self.loss(row, following) >= self.loss(row, best):
                return float(best)
            best = following

    def loss(self, row: Row, lr: float) -> float:
        found = float(self.result(row, "flops", lr, 0)["loss_calibrated"])
        return found if found == found else float("inf")

    def result(self, row: Row, equal: str, lr: float, seed: int) -> Result:
        """From the file, or trained now."""
        method = fill(row.method, self.size)
        job = {"name": row.name, "group": row.group, "equal": equal, "lr": lr, "seed": seed, "size": asdict(self.size)}
        job["text"] = self.text
        job["method"] = json.loads(json.dumps(asdict(method)))
        for done in read_results(self.args.output):
            done["method"] = {**asdict(Method()), **done["method"]}  # of before an attribute was added
            if all(done.get(key) == value for key, value in job.items() if key != "group"):
                return done
        heldout = self.sequences.heldout[::_HELDOUT_STRIDE]
        result = train(method, self.size, self.sequences.train, heldout, lr=lr, seed=seed, equal=equal)
        result = {**job, **result, "versions": _versions(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        append_result(self.args.output, result)
        print(
            f"{row.name} | {equal} | lr {lr:g} | seed {seed} | {result['loss']:.4f} | {result['seconds']:.0f} s",
            flush=True,
        )
        return result


def fill(method: Method, size: Size) -> Method:
    """Names of layers for a model of this size."""
    shared = [name.replace("{last}", str(size.layers - 1)) for name in method.sdp.get("shared_modules", [])]
    return with_sdp(method, shared_modules=shared) if shared else replace(method)


def read_results(path: Path) -> list[Result]:
    """All finished trainings."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def append_result(path: Path, result: Result) -> None:
    """One line in one write; several sweeps may share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
