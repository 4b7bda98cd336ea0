"""Tables and figures of ``benchmarks/quality/run.py``: means and standard errors over the seeds.

    python -m benchmarks.quality.tables --results benchmarks/results/quality.jsonl \
        --summary benchmarks/results/quality.json --plot docs/quality.png

Losses are those of the calibrated full model, for dense training too; "not calibrated" is beside them. Differences are
paired: trainings of one seed have the same initial weights and order of the text. Prints markdown.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.figures import plot
from benchmarks.quality.memory import Memory, memory_of, preset_state
from benchmarks.quality.methods import ROWS, SIZES
from benchmarks.quality.ownership import parse_sdp
from benchmarks.quality.run import Result, fill, read_results
from deepspeed_sdp.options import OptionParser

DENSE = "dense"
PRESET = "llama-1b"
Losses = dict[int, float]


def main(arguments: list[str] | None = None) -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--summary", type=Path, help="a JSON file of the same figures")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    results = Results(read_results(args.results), args.size)
    if not results.rows:
        parser.error(
            f"--results: {args.results} holds no training of size {args.size!r}; run benchmarks.quality.run first"
        )
    rows = [summary for row in ROWS if (summary := results.summary(row))]
    options = [options_table(rows, parent) for parent in parents(rows)]
    print(results.tuning(), main_table(rows), *options, sep="\n\n")
    if args.summary:
        write_summary(args.summary, args, results, rows)
    if args.plot:
        plot(rows, args.plot)


class Results:
    """The trainings of one size on one text: the last one in the file."""

    def __init__(self, results: list[Result], size: str) -> None:
        self.size_name, self.size = size, SIZES[size]
        mine = [r for r in results if r["size"] == asdict(self.size)]
        self.rows = [r for r in mine if r["text"] == mine[-1]["text"]]

    def losses(self, name: str, equal: str, key: str = "loss_calibrated") -> Losses:
        """By seed, at the tuned learning rate."""
        lr = self.lr(name)
        mine = [r for r in self.rows if (r["name"], r["lr"]) == (name, lr)]
        # What costs as many FLOPs per token as dense training is the same run either way.
        return {r["seed"]: r[key] for r in mine if r["equal"] == equal or abs(r["flop_ratio"] - 1.0) < 1e-6}

    def lr(self, name: str) -> float | None:
        """The best at seed 0; a row that varies another takes the other's."""
        found = {r["lr"]: r["loss_calibrated"] for r in self.rows if self._is_tuning(r, ROWS[name].like or name)}
        return min(found, key=lambda lr: found[lr]) if found else None

    def tuning(self) -> str:
        """The losses of seed 0 at every learning rate that was tried."""
        tuned = [name for name, row in ROWS.items() if not row.like and self.lr(name)]
        rates = sorted({r["lr"] for r in self.rows})
        lines = [
            f"| loss at learning rate | {' | '.join(f'{lr:g}' for lr in rates)} |",
            "|---" * (len(rates) + 1) + "|",
        ]
        for name in tuned:
            found = {r["lr"]: r["loss_calibrated"] for r in self.rows if self._is_tuning(r, name)}
            lines.append(f"| {name} | " + " | ".join(f"{found[lr]:.3f}" if lr in found else "" for lr in rates) + " |")
        return "\n".join(lines)

    def _is_tuning(self, result: Result, name: str) -> bool:
        return (result["name"], result["equal"], result["seed"]) == (name, "flops", 0)

    def summary(self, name: str) -> dict[str, Any] | None:
        """Figures of a row; ``None`` if it was not run."""
        flops = self.losses(name, "flops")
        if not flops:
            return None
        first = next(r for r in self.rows if r["name"] == name and r["equal"] == "flops" and r["lr"] == self.lr(name))
        memory, dense = self.memory(name), self.memory(DENSE)
        parent = ROWS[name].like
        as_trained = self.losses(name, "flops", "loss")
        return {
            "name": name,
            "parent": parent,
            "group": ROWS[name].group,
            "method": first["method"],
            "lr": self.lr(name),
            "seeds": len(flops),
            "seeds_at_equal_tokens": len(self.losses(name, "tokens")),
            "flop_ratio": first["flop_ratio"],
            "tokens": first["tokens"],
            "spectral_gap": first["spectral_gap"],
            "equal_flops": mean_and_error(list(flops.values())),
            "equal_flops_beside_dense": paired(flops, self.losses(DENSE, "flops")),
            "equal_flops_beside_parent": paired(flops, self.losses(parent, "flops")) if parent else None,
            "equal_tokens": _mean(self.losses(name, "tokens")) if not parent else None,
            "equal_tokens_beside_dense": paired(self.losses(name, "tokens"), self.losses(DENSE, "tokens")),
            "as_trained": _mean(as_trained),
            "calibration_changes": paired(flops, as_trained),
            "calibration": sorted(self.losses(name, "flops", "calibration").values()),
            "state": memory.state,
            "activations": memory.activations,
            "state_ratio": {stage: memory.state[stage] / dense.state[stage] for stage in memory.state},
            "activation_ratio": memory.activations / dense.activations,
            "preset_state_ratio": _preset_ratio(json.dumps(first["method"]["sdp"]), self.size.workers)
            if ROWS[name].method.share == 1.0
            else None,
            "seconds": mean_and_error([r["seconds"] for r in self.rows if r["name"] == name])[0],
        }

    def memory(self, name: str) -> Memory:
        """Of a rank, outside of phases with another coverage."""
        method = fill(ROWS[name].method, self.size)
        return _memory(self.size_name, json.dumps(method.sdp), method.same_split, method.share)


@cache
def _memory(size_name: str, block: str, same_split: bool, share: float) -> Memory:
    size = SIZES[size_name]
    sdp = parse_sdp(json.loads(block), seq_length=size.length)
    ids = torch.zeros(size.sequences, size.length, dtype=torch.long)
    return memory_of(size.build(0, share), sdp, size.workers, ids, same_split)


@cache
def _preset_ratio(block: str, workers: int) -> dict[int, float] | None:
    sdp = json.loads(block)
    if sdp.get("shared_modules"):  # names of layers of the small model
        return None
    mine, dense = (preset_state(PRESET, parse_sdp(keys), workers) for keys in (sdp, {"coverage": 1.0}))
    return {stage: mine[stage] / dense[stage] for stage in mine}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (nan for one value)."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def _mean(losses: Losses) -> tuple[float, float] | None:
    return mean_and_error(list(losses.values())) if losses else None


def paired(losses: Losses, others: Losses) -> tuple[float, float] | None:
    """The mean difference over the seeds that both have, and its standard error."""
    differences = [losses[seed] - others[seed] for seed in sorted(losses) if seed in others]
    return mean_and_error(differences) if differences else None


def parents(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows that others vary."""
    return list(dict.fromkeys(row["parent"] for row in rows if row["parent"]))


def main_table(rows: list[dict[str, Any]]) -> str:
    """Loss and memory of what is tuned."""
    lines = [
        "| | FLOPs per token | loss, equal FLOPs (seeds) | beside dense | not calibrated | loss, equal tokens "
        f"(seeds) | beside dense | state, ZeRO 0 | state, ZeRO 1 | activations | {PRESET}: state, ZeRO 0 | ZeRO 1 |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        if row["parent"]:
            continue
        cells = [
            row["name"],
            f"{row['flop_ratio']:.3f}",
            f"{_value(row['equal_flops'])} ({row['seeds']})",
            difference(row["equal_flops_beside_dense"]),
            _value(row["as_trained"]),
            f"{_value(row['equal_tokens'])} ({row['seeds_at_equal_tokens']})" if row["equal_tokens"] else "",
            difference(row["equal_tokens_beside_dense"]),
            *_percent(row["state_ratio"]),
            f"{100 * row['activation_ratio']:.0f} %",
            *_percent(row["preset_state_ratio"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options_table(rows: list[dict[str, Any]], parent: str) -> str:
    """What an option changes, beside the row it varies; better ones first."""
    lines = [
        f"| {parent} | seeds | FLOPs per token | loss, equal FLOPs | change | beside dense | not calibrated | "
        "factors | state, ZeRO 0 |",
        "|---" * 9 + "|",
    ]
    mine = [row for row in rows if parent in (row["name"], row["parent"])]
    for row in sorted(mine, key=lambda row: (row["equal_flops_beside_parent"] or (0.0,))[0]):
        cells = [
            ROWS[row["name"]].variant if row["parent"] else "as it is",
            str(row["seeds"]),
            f"{row['flop_ratio']:.3f}",
            _value(row["equal_flops"]),
            difference(row["equal_flops_beside_parent"]),
            difference(row["equal_flops_beside_dense"]),
            _value(row["as_trained"]),
            ", ".join(f"{factor:g}" for factor in row["calibration"]),
            _percent(row["state_ratio"])[0],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f}{_error(value[1])}"


def difference(value: tuple[float, float] | None) -> str:
    """``+0.012 ± 0.024``."""
    return "" if value is None or value[0] == 0.0 else f"{value[0]:+.3f}{_error(value[1])}"


def _error(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.3f}"


def _percent(ratios: dict[int, float] | None) -> list[str]:
    return [f"{100 * ratio:.0f} %" for ratio in ratios.values()] if ratios else ["", ""]


def write_summary(path: Path, args: argparse.Namespace, results: Results, rows: list[dict[str, Any]]) -> None:
    """The figures with what they were measured on; replaced whole."""
    last = results.rows[-1]
    report = {
        "command": "make bench-quality",
        "date": last["date"],
        "versions": last["versions"],
        "hardware": f"{last['cores']} CPU cores, one thread per training",
        "size": {"name": args.size, **asdict(results.size)},
        "parameters": sum(p.numel() for p in results.size.build(0).parameters()),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(_without_nan(report), indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)


def _without_nan(value: Any) -> Any:
    """The error of one seed is not a number, and JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
