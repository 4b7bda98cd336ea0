"""Forward and backward masking and dense training, on one model and one text: memory, time, traffic and loss.

    deepspeed --num_accelerators 4 benchmarks/masking.py \
        --output benchmarks/results/masking.json --plot docs/masking.png

All contenders start from the same weights, see the same batches in the same order, and take the matmul FLOPs (counted
by ``torch.utils.flop_counter``) of ``--steps`` dense steps; so loss can be read at equal tokens (after ``--steps``
steps) and at equal FLOPs (at the end). bf16 with fp32 master weights. Memory is of live tensors: weights, optimizer,
the peak of gradients, and what autograd keeps of activations; the largest rank. Time is the median of ratios to dense
of steps in turn, before the training. The text is the built-in one (see ``launch/train.py``).
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from engines import Rows, build_engine, build_llama, largest, make_parser, mean, report, start, step
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.data import RankSampler, ShardOptions, Shards, SourceSpec, open_shards, prepare_shards
from deepspeed_sdp.engine import gradient_peak, model_state_bytes
from deepspeed_sdp.pretraining.text import stack
from deepspeed_sdp.report.saved_activations import saved_activations

BLOCKS = {"granularity": "layer"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "dense": {"coverage": 1.0},
    "forward, neurons": {},
    "forward, blocks": BLOCKS,
    "backward, neurons": {"masking": "backward"},
    "backward, blocks": {"masking": "backward", **BLOCKS},
    "backward, blocks, recomputed": {"masking": "backward", **BLOCKS, "backward": {"recompute_frozen": True}},
}
MEMORY = ("weights", "optimizer", "gradient_peak", "activations")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, hidden_size=192, layers=8, vocab_size=2048)
    parser.set_defaults(stages=[1])
    parser.add_argument("--coverage", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=200, help="of the dense model")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--repetitions", type=int, default=9, help="of the steps that are timed")
    parser.add_argument("--evaluate_every", type=int, default=25)
    parser.add_argument("--data", type=Path, default=Path("runs/masking/data"), help="where the prepared text lies")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    start()
    shards = load(args)
    rows = [row for stage in args.stages for row in run_stage(args, shards, stage)]
    if args.plot and dist.get_rank() == 0:
        plot(rows, args.plot)
    report(args, rows, table)


def load(args: argparse.Namespace) -> Shards:
    options = ShardOptions(SourceSpec(("builtin:6",)), train_tokenizer=args.vocab_size, heldout_fraction=0.02)
    from_first_rank(lambda: prepare_shards(args.data, options, workers=1, overwrite="outdated") and None)
    return open_shards(args.data)


def run_stage(args: argparse.Namespace, shards: Shards, stage: int) -> Rows:
    timed = time_in_turn(args, shards, stage)
    rows = []
    for name in CONTENDERS:
        row = {"stage": stage, "contender": name, **timed[name]}
        dense_flops = rows[0]["flops"] if rows else None
        rows.append({**row, **run(args, shards, stage, name, dense_flops)})
        if dist.get_rank() == 0:
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def time_in_turn(args: argparse.Namespace, shards: Shards, stage: int) -> dict[str, dict[str, Any]]:
    engines = {name: build(args, stage, name) for name in CONTENDERS}
    batches = {name: batches_of(args, shards) for name in engines}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repetition in range(-1, args.repetitions):
        # The order turns, so that no contender always follows the same one.
        names = list(engines)[repetition % len(engines) :] + list(engines)[: repetition % len(engines)]
        for name in names:
            dist.barrier()
            began = time.perf_counter()
            step(engines[name], next(batches[name]))
            engines[name].optimizer.refresh.settle()
            get_accelerator().synchronize()
            dist.barrier()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - began)
    for engine in engines.values():
        engine.destroy()
    engines.clear()
    gc.collect()
    return {name: ratios(mine, seconds["dense"]) for name, mine in seconds.items()}


def ratios(mine: list[float], dense: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([a / b for a, b in zip(mine, dense, strict=True)], n=4)
    return {"seconds_per_step": statistics.median(mine), "time_ratio": median, "time_ratio_quartiles": [low, high]}


def run(args: argparse.Namespace, shards: Shards, stage: int, name: str, dense_flops: float | None) -> dict[str, Any]:
    engine, batches = build(args, stage, name), batches_of(args, shards)
    with FlopCounterMode(display=False) as counter, saved_activations(engine.module) as activations:
        step(engine, next(batches))
    with gradient_peak(engine) as peak:
        step(engine, next(batches))
    flops = mean(counter.get_total_flops())
    # As many FLOPs as the dense model in all its steps.
    steps = round(args.steps * (dense_flops or flops) / flops)
    losses = []
    for done in range(3, steps + 1):
        step(engine, next(batches))
        if done % args.evaluate_every == 0 or done in (args.steps, steps):
            losses.append({"step": done, "flops": done * flops, "loss": evaluate(args, shards, engine)})
    state, stats = model_state_bytes(engine), engine.sdp_stats()
    memory = {
        "weights": largest(state["weights"]),
        "optimizer": largest(state["optimizer"]),
        "gradient_peak": largest(peak.nbytes),
        "activations": largest(activations.total),
    }
    engine.destroy()
    return {
        **memory,
        "memory": sum(memory.values()),
        "flops": flops,
        "flop_ratio": flops / (dense_flops or flops),
        "bytes_sent": mean(stats["bytes_sent"]),
        "bytes_sent_by_kind": stats["bytes_sent_by_kind"],
        "steps": steps,
        "losses": losses,
        "loss_at_equal_tokens": next(point["loss"] for point in losses if point["step"] == args.steps),
        "loss_at_equal_flops": losses[-1]["loss"],
    }


def build(args: argparse.Namespace, stage: int, name: str) -> Any:
    optimizer = {"lr": args.lr, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": args.lr, "warmup_num_steps": 20}},
    }
    return build_engine(build_llama(args, head_size=32), config, {"coverage": args.coverage, **CONTENDERS[name]})


def batches_of(args: argparse.Namespace, shards: Shards) -> Any:
    dataset = shards.sequences("train", args.sequence)
    sampler = RankSampler(len(dataset), seed=0)
    for indices in sampler.batches(dist.get_rank(), dist.get_world_size(), args.micro_batch):
        yield torch.stack([dataset[int(i)]["input_ids"] for i in indices])


def evaluate(args: argparse.Namespace, shards: Shards, engine: Any) -> float:
    dataset = shards.sequences("heldout", args.sequence)
    mine = range(dist.get_rank(), len(dataset), dist.get_world_size())
    parts = [mine[start : start + args.micro_batch] for start in range(0, len(mine), args.micro_batch)]
    return float(engine.evaluate_full([stack([dataset[i] for i in part]) for part in parts]))


def table(rows: Rows) -> str:
    lines = [
        "| ZeRO | | memory MB | weights | optimizer | gradients | activations | FLOPs | time (quartiles) | "
        "sent MB/step | val loss, equal tokens | val loss, equal FLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["time_ratio_quartiles"]
        sizes = " | ".join(f"{r[kind] / 1e6:.1f}" for kind in ("memory", *MEMORY))
        lines.append(
            f"| {r['stage']} | {r['contender']} | {sizes} | {r['flop_ratio']:.3f} | {r['time_ratio']:.2f} ({low:.2f} "
            f"to {high:.2f}) | {r['bytes_sent'] / 1e6:.2f} | {r['loss_at_equal_tokens']:.3f} | "
            f"{r['loss_at_equal_flops']:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    """Memory by kind, and the full model's loss over FLOPs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["contender"] for row in rows]
    bottom = [0.0] * len(rows)
    for kind, label in zip(MEMORY, ("weights", "optimizer", "gradients, peak", "activations"), strict=True):
        sizes = [row[kind] / 1e6 for row in rows]
        left.barh(names, sizes, left=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("MB per rank")
    left.legend(frameon=False, fontsize=8)
    for row in rows:
        if not CONTENDERS[row["contender"]].get("backward"):
            right.plot(
                [point["flops"] / 1e12 for point in row["losses"]],
                [point["loss"] for point in row["losses"]],
                marker="o",
                ms=3,
                lw=1.2,
                label=row["contender"],
            )
    right.set_xlabel("matmul TFLOPs per rank")
    right.set_ylabel("validation loss of the full model, nats")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
