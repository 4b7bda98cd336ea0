"""Hundreds and thousands of ranks, in numbers: start, memory, communicators, messages, and what those would take.

    python benchmarks/scale.py --output benchmarks/results/scale.json

For every model, world and ZeRO stage one process is rank 0 of such a job (``scale_rank.py``): it runs the engine's own
start and one step on the meta device. What it would send is priced by a model of links, of which docs/scale.md tells.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from deepspeed_sdp.options import OptionParser
from deepspeed_sdp.presets import model_path

RANKS_PER_NODE, SEQUENCE = 8, 8192
STARTING = ("agreement and plan", "cut", "groups", "buckets")
# What a rank of the largest job should stay within; how it is shown, and in which unit.
GOALS = {
    "start": ("host work of the start, s", 10.0, 1.0),
    "memory": ("memory of the start, GB", 1.0, 1e9),
    "communicators": ("communicators", 40, 1.0),
    "ring_latency": ("ring latency of a step, s", 0.5, 1.0),
    "index": ("checkpoint index, MB", 10.0, 1e6),
}


@dataclass(frozen=True)
class Links:
    """What a message costs. Latencies are those by which NCCL itself chooses (``src/graph/tuning.cc``, Simple).

    Attributes:
        launch: seconds before the first byte.
        hop_inside, hop_outside: seconds of one step of a ring within a node, and to another node.
        inside, outside: bytes per second that a GPU sends within its node, and through its own network card.
        flops: per second that a GPU reaches.
    """

    launch: float = 8.4e-6
    hop_inside: float = 3.4e-6
    hop_outside: float = 9.6e-6
    inside: float = 450e9
    outside: float = 50e9
    flops: float = 0.4 * 989e12

    def ring_latency(self, kind: str, ranks: int, nodes: int) -> float:
        """A ring passes through all ranks of a node before it goes to the next one."""
        if kind == "all-to-all":
            return self.launch + (self.hop_outside if nodes > 1 else self.hop_inside)
        rounds = 2 if kind == "all-reduce" else 1
        return self.launch + rounds * ((ranks - nodes) * self.hop_inside + (nodes - 1) * self.hop_outside)

    def tree_latency(self, kind: str, ranks: int, nodes: int) -> float:
        """Of a tree, or a reduce-scatter and all-gather in powers of two: a chain in each node, halving among nodes."""
        if kind == "all-to-all":
            return self.ring_latency(kind, ranks, nodes)
        rounds = 2 if kind == "all-reduce" else 1
        inside = (-(-ranks // nodes) - 1) * self.hop_inside
        return self.launch + rounds * (inside + (nodes - 1).bit_length() * self.hop_outside)

    def transfer(self, kind: str, ranks: int, nodes: int, nbytes: int) -> float:
        """Seconds of the bytes alone. A group uses the network cards of its own ranks."""
        rounds = 2 if kind == "all-reduce" else 1
        rate = self.inside if nodes == 1 else min(self.inside, self.outside * ranks / nodes)
        return rounds * nbytes * (ranks - 1) / ranks / rate


def priced(row: Mapping[str, Any], links: Links, tokens: int = SEQUENCE) -> dict[str, float]:
    """Seconds of one rank and step, one message after the other; computation of ``tokens`` beside it."""
    found = dict.fromkeys(("ring_latency", "tree_latency", "transfer"), 0.0)
    for kind, ranks, nodes, nbytes, count in row["messages"]:
        if ranks > 1:
            found["ring_latency"] += count * links.ring_latency(kind, ranks, nodes)
            found["tree_latency"] += count * links.tree_latency(kind, ranks, nodes)
            found["transfer"] += count * links.transfer(kind, ranks, nodes, nbytes)
    return {**found, "computation": tokens * row["flops_per_token"]["mean"] / links.flops}


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What :data:`GOALS` are about, of one row."""
    return {
        "start": sum(value for name, value in row["seconds"].items() if name in STARTING),
        "memory": row["start_memory"],
        "communicators": row["communicators"]["device"],
        "ring_latency": row["priced"]["ring_latency"],
        "index": row["index_bytes"],
    }


def tables(report: Mapping[str, Any]) -> str:
    """Markdown, as docs/scale.md has it."""
    rows = report["rows"]
    return "\n\n".join([_goal_table(rows), _start_table(rows), _step_table(rows)])


def _goal_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the last model and the largest world."""
    rows = [row for row in rows if row["model"] == rows[-1]["model"] and row["world"] == max(r["world"] for r in rows)]
    name = f"{rows[0]['model']}, {rows[0]['world']:,} ranks"
    lines = [
        f"| {name} | goal | " + " | ".join(f"ZeRO {row['stage']}, {row['masking']}" for row in rows) + " |",
        "| --- " * (2 + len(rows)) + "|",
    ]
    for key, (title, goal, unit) in GOALS.items():
        cells = [f"{figures(row)[key] / unit:.3g}" for row in rows]
        lines.append(f"| {title} | {goal:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _start_table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| model | ranks | ZeRO | masking | owner sets | communicators | rounds | buckets | plan, KB | start, s | "
        "of it plan and agreement | start, MB | index, MB |",
        "| --- " * 13 + "|",
    ]
    for row in rows:
        goals = figures(row)
        cells = (
            row["model"], f"{row['world']:,}", row["stage"], row["masking"], row["owner_sets"],
            row["communicators"]["device"], f"{row['rounds']:,}", f"{row['buckets']:,}", row["plan_bytes"] // 1000,
            f"{goals['start']:.1f}", f"{row['seconds']['agreement and plan']:.1f}", f"{goals['memory'] / 1e6:.0f}",
            f"{goals['index'] / 1e6:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _step_table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| model | ranks | ZeRO | masking | bucket, million | messages | sent, GB | host, s | ring latency, s | tree "
        "latency, s | transfer, s | computation, s |",
        "| --- " * 12 + "|",
    ]
    for row in rows:
        cost, seconds = row["priced"], row["seconds"]
        cells = (
            row["model"], f"{row['world']:,}", row["stage"], row["masking"], row["bucket_numel"] // 10**6,
            f"{sum(message[-1] for message in row['messages']):,}", f"{sum(row['sent'].values()) / 1e9:.1f}",
            f"{seconds['forward and backward'] + seconds['update']:.1f}",
            *(f"{cost[name]:.2f}" for name in ("ring_latency", "tree_latency", "transfer", "computation")),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.one:
        print(json.dumps(one(args.models[0], args.worlds[0], args.stages[0], args.masking[0])))
        return
    rows = []
    for model in args.models:
        for masking in args.masking:
            for stage in args.stages if masking == "forward" else [s for s in args.stages if s < 3]:
                for world in args.worlds:
                    print(f"{model}, {world} ranks, ZeRO {stage}, {masking}", file=sys.stderr, flush=True)
                    rows.append(_in_a_process(model, world, stage, masking))
    report = {
        "command": "python benchmarks/scale.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "date": f"{date.today()}",
        "python": platform.python_version(),
        "links": asdict(Links()),
        "rows": rows,
    }
    print(tables(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-7b", "llama-70b", "llama-405b"], metavar="PRESET")
    parser.add_argument("--worlds", nargs="+", type=int, default=[512, 1024, 4096], metavar="RANKS")
    parser.add_argument("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=[1, 3])
    parser.add_argument("--masking", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--one", action="store_true", help="the first of each, in this process, as JSON")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the figures into this file")
    return parser.parse_args(arguments)


def one(model: str, world: int, stage: int, masking: str) -> dict[str, Any]:
    """One row, in this process, which can be one rank only."""
    import torch
    from scale_rank import simulate

    from deepspeed_sdp.subnetwork import meta_model, read_model_config

    full = meta_model(read_model_config(model_path(model, "--models"), "--models"), "--models").to(torch.bfloat16)
    row = {"model": model, **simulate(full, world, RANKS_PER_NODE, stage, masking, SEQUENCE)}
    return {**row, "priced": priced(row, Links())}


def _in_a_process(model: str, world: int, stage: int, masking: str) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--one", "--models", model, "--worlds", str(world), "--stages", str(stage),
        "--masking", masking,
    ]  # fmt: skip
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
