"""Bytes of model state per rank beside the design's figures, on live tensors, and plain DeepSpeed beside them.

    deepspeed --num_accelerators 4 benchmarks/engine_memory.py --output benchmarks/results/engine_memory.json

bf16 with fp32 master weights and Adam. Per partitioned parameter and with ``C = K/N`` the design gives ``2C`` bytes
of weights (``2C/K`` at ZeRO-3), gradients ``2C``, optimizer ``12C`` (``12C/K`` from ZeRO-1 on); shared parameters are
those of a dense model, ``C = 1`` and ``K = N``. The peak is the largest sum of weights, optimizer and live gradients
seen at any gradient of a backward pass and at the update; activations are not in it. From ZeRO-2 on gradients are
freed while the backward pass runs, so the peak lies below the figure.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from engines import Rows, build_engine, build_llama, is_possible, largest, make_parser, report, start, step

from deepspeed_sdp.engine import gradient_peak, model_state_bytes

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "deepspeed": None,
    "coverage 1": {"coverage": 1.0},
    "coverage 3/4": {"coverage": 0.75},
    "coverage 1/2": {"coverage": 0.5},
    "coverage 1/2, blocks": {"coverage": 0.5, "granularity": "layer"},
    "coverage 1/4": {"coverage": 0.25},
    "backward 1/2": {"coverage": 0.5, "masking": "backward"},
    "backward 1/2, blocks": {"coverage": 0.5, "masking": "backward", "granularity": "layer"},
    "backward 1/4": {"coverage": 0.25, "masking": "backward"},
}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, hidden_size=256, layers=8, vocab_size=1024)
    parser.add_argument("--bucket", type=int, default=200_000, help="reduce_bucket_size: small beside this small model")
    return parser.parse_args()


def main() -> None:
    args = parse()
    start()
    rows = [(stage, name) for stage in args.stages for name in CONTENDERS if is_possible(stage, CONTENDERS[name])]
    report(args, [run(args, *row) for row in rows], table)


def run(args: argparse.Namespace, stage: int, name: str) -> dict[str, Any]:
    engine = build(args, stage, CONTENDERS[name])
    train(args, engine)
    with gradient_peak(engine) as peak:
        train(args, engine)
    state = model_state_bytes(engine)
    row = {"stage": stage, "engine": name, "gradient_peak": peak.nbytes}
    row.update({kind: state[kind] for kind in ("weights", "optimizer")})
    row["peak"] = row["weights"] + row["optimizer"] + row["gradient_peak"]
    row["design"] = design_bytes(engine, stage) if CONTENDERS[name] else None
    engine.destroy()
    sizes = ("gradient_peak", "weights", "optimizer", "peak", "design")
    return {key: largest(value) if key in sizes and value is not None else value for key, value in row.items()}


def design_bytes(engine: Any, stage: int) -> float:
    """Weights, gradients and optimizer by the design's table, from the plan alone."""
    total = 0.0
    plan, subnetwork = engine.plan, engine._subnetwork
    replicas = dist.get_world_size() // plan.num_subnetworks
    for name, fragment in subnetwork.fragments.items():
        owners = len(plan.owner_sets[fragment.owner_set]) * replicas
        # At ZeRO-3 a parameter keeps its shape while its memory is gone.
        numel = subnetwork.module.get_parameter(name).numel()
        weights = 2.0 / (owners if stage == 3 else 1)
        total += numel * (weights + 2.0 + 12.0 / (owners if stage else 1))
    return total


def build(args: argparse.Namespace, stage: int, sdp: dict[str, Any] | None) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": args.bucket},
        "bf16": {"enabled": True},
    }
    return build_engine(build_llama(args, head_size=32), config, sdp)


def train(args: argparse.Namespace, engine: Any) -> None:
    step(engine, torch.randint(0, args.vocab_size, (1, 32)))


def table(rows: Rows) -> str:
    lines = [
        "| ZeRO | engine | weights MB | optimizer MB | gradient peak MB | peak MB | design MB | peak / design |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sizes = " | ".join(f"{r[kind] / 1e6:.2f}" for kind in ("weights", "optimizer", "gradient_peak", "peak"))
        design = f"{r['design'] / 1e6:.2f} | {r['peak'] / r['design']:.3f}" if r["design"] else " | "
        lines.append(f"| {r['stage']} | {r['engine']} | {sizes} | {design} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
