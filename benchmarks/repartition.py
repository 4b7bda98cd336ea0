"""What a re-partition takes, beside a step: seconds, bytes sent, and how often one can be afforded.

    deepspeed --num_accelerators 4 benchmarks/repartition.py --output benchmarks/results/repartition.json

Steps and re-partitions are timed in turn, in one run; the ratio is the median over repetitions.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from engines import Rows, build_engine, build_llama, make_parser, report, start, step

CHANGES: dict[str, list[dict[str, Any]]] = {
    "other units, same groups": [],
    "coverage 1/2 to 3/4 and back": [{"coverage": 0.75}, {"coverage": 0.5}],
    "neurons to layers and back": [{"granularity": "layer"}, {"granularity": "neuron"}],
}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, hidden_size=512, layers=4, vocab_size=2048)
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse()
    start()
    report(args, [row for stage in args.stages for row in run_stage(args, stage)], table)


def run_stage(args: argparse.Namespace, stage: int) -> Rows:
    config = {"train_micro_batch_size_per_gpu": args.micro_batch, "zero_optimization": {"stage": stage}}
    engine = build_engine(build_llama(args, head_size=64), config, {"coverage": 0.5})
    numel = sum(p.numel() for p in engine._subnetwork.full.skeleton.parameters())
    ids = torch.randint(0, args.vocab_size, (args.micro_batch, args.sequence))
    rows = []
    for name, changes in CHANGES.items():
        seconds: dict[str, list[float]] = {"step": [], "change": []}
        sent = []
        for repetition in range(-1, args.repetitions):
            step(engine, ids)
            began = time.perf_counter()
            step(engine, ids)
            middle = time.perf_counter()
            if changes:
                engine.repartition(sdp_config=changes[repetition % len(changes)])
            else:
                engine.repartition(engine.plan.resampled(1))
            dist.barrier()
            if repetition >= 0:
                seconds["step"].append(middle - began)
                seconds["change"].append(time.perf_counter() - middle)
                step(engine, ids)
                sent.append(engine.sdp_stats()["bytes_sent_by_kind"]["repartition"])
        ratios = [change / one for change, one in zip(seconds["change"], seconds["step"], strict=True)]
        rows.append({
            "stage": stage, "change": name, "ratio": statistics.median(ratios), "least": min(ratios),
            "most": max(ratios), "bytes_per_parameter": statistics.mean(sent) / numel,
        })  # fmt: skip
    engine.destroy()
    return rows


def table(rows: Rows) -> str:
    lines = ["| ZeRO | change | in steps (least to most) | bytes sent by a rank, per parameter of the model |"]
    lines.append("| --- | --- | --- | --- |")
    lines += [
        f"| {row['stage']} | {row['change']} | {row['ratio']:.1f} ({row['least']:.1f} to {row['most']:.1f}) | "
        f"{row['bytes_per_parameter']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
