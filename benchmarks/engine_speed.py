"""SDP's engine beside plain DeepSpeed: step time, FLOPs, traffic and memory, alternated in one run.

    deepspeed --num_accelerators 4 benchmarks/engine_speed.py --output benchmarks/results/engine_speed.json

Per ZeRO stage it builds plain DeepSpeed and the SDP engines in one process and runs them in turn, a few steps each,
again and again; so a slow minute of the machine hits all of them alike. Ratios are medians over the repetitions of
(contender / plain DeepSpeed) in the same repetition; the spread is their interquartile range. FLOPs are counted by
``torch.utils.flop_counter`` over forward and backward pass, embeddings and head included.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from engines import Rows, build_engine, build_llama, is_possible, make_parser, mean, report, start, step
from torch.utils.flop_counter import FlopCounterMode

from deepspeed_sdp.engine import gradient_peak, model_state_bytes

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "deepspeed": None,
    "coverage 1": {"coverage": 1.0},
    "coverage 1/2, all_to_all": {"coverage": 0.5, "comm": {"transport": "all_to_all"}},
    "coverage 1/2, owner_sets": {"coverage": 0.5, "comm": {"transport": "owner_sets"}},
    "backward 1/2": {"coverage": 0.5, "masking": "backward"},
    "backward 1/2, blocks": {"coverage": 0.5, "masking": "backward", "granularity": "layer"},
}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, hidden_size=512, layers=4, vocab_size=2048)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in each repetition")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    return parser.parse_args()


def main() -> None:
    args = parse()
    start()
    report(args, [r for stage in args.stages for r in run_stage(args, stage)], table)


def run_stage(args: argparse.Namespace, stage: int) -> Rows:
    names = [name for name in args.contenders if is_possible(stage, CONTENDERS[name])]
    engines = {name: build(args, stage, CONTENDERS[name]) for name in names}
    for engine in engines.values():
        train(args, engine, 2)
    flops = {name: count_flops(args, engine) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repetition in range(args.repetitions):
        # The order turns, so that no contender always follows the same one.
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            dist.barrier()
            began = time.perf_counter()
            train(args, engines[name], args.steps)
            dist.barrier()
            seconds[name].append((time.perf_counter() - began) / args.steps)
    rows = [row(args, stage, name, engines[name], seconds, flops) for name in engines]
    for engine in engines.values():
        engine.destroy()
    engines.clear()
    gc.collect()
    return rows


def row(
    args: argparse.Namespace,
    stage: int,
    name: str,
    engine: Any,
    seconds: dict[str, list[float]],
    flops: dict[str, float],
) -> dict[str, Any]:
    base = "deepspeed" if "deepspeed" in seconds else name
    ratios = [mine / other for mine, other in zip(seconds[name], seconds[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    with gradient_peak(engine) as peak:
        train(args, engine, 1)
    state = model_state_bytes(engine)
    stats = engine.sdp_stats() if hasattr(engine, "sdp_stats") else {}
    flop_ratio = mean(flops[name] / flops[base])
    return {
        "stage": stage,
        "engine": name,
        "seconds_per_step": statistics.median(seconds[name]),
        "time_ratio": median,
        "time_ratio_quartiles": [low, high],
        "flop_ratio": flop_ratio,
        "time_over_flops": median / flop_ratio,
        "state_bytes": mean(state["total"]),
        "gradient_peak_bytes": mean(peak.nbytes),
        "bytes_sent": mean(stats["bytes_sent"]) if stats else None,
        "seconds": stats.get("seconds"),
    }


def build(args: argparse.Namespace, stage: int, sdp: dict[str, Any] | None) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.bf16},
    }
    return build_engine(build_llama(args, head_size=64), config, sdp)


def train(args: argparse.Namespace, engine: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        shape = (args.micro_batch, args.sequence)
        step(engine, torch.randint(0, args.vocab_size, shape, generator=generator))
    get_accelerator().synchronize()


def count_flops(args: argparse.Namespace, engine: Any) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        train(args, engine, 1)
    return float(counter.get_total_flops())


def table(rows: Rows) -> str:
    lines = [
        "| ZeRO | engine | s/step | time / DeepSpeed (quartiles) | FLOPs / DeepSpeed | time / FLOPs | state MB | "
        "gradient peak MB | sent MB/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["time_ratio_quartiles"]
        sent = "" if r["bytes_sent"] is None else f"{r['bytes_sent'] / 1e6:.2f}"
        lines.append(
            f"| {r['stage']} | {r['engine']} | {r['seconds_per_step']:.3f} | {r['time_ratio']:.3f} ({low:.3f} to "
            f"{high:.3f}) | {r['flop_ratio']:.3f} | {r['time_over_flops']:.3f} | {r['state_bytes'] / 1e6:.1f} | "
            f"{r['gradient_peak_bytes'] / 1e6:.1f} | {sent} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
