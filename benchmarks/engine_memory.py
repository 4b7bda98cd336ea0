"""Bytes of model state per rank beside the design's figures, on live tensors, and plain DeepSpeed beside them.

    deepspeed --num_accelerators 4 benchmarks/engine_memory.py --output benchmarks/results/engine_memory.json

bf16 with fp32 master weights and Adam. Per partitioned parameter and with ``C = K/N`` the design gives ``2C`` bytes
of weights (``2C/K`` at ZeRO-3), gradients ``2C``, optimizer ``12C`` (``12C/K`` from ZeRO-1 on); shared parameters are
those of a dense model, ``C = 1`` and ``K = N``. The peak is the largest sum of weights, optimizer and live gradients
seen at any gradient of a backward pass and at the update; activations are not in it. From ZeRO-2 on gradients are
freed while the backward pass runs, so the peak lies below the figure.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_sdp
from deepspeed_sdp.engine import gradient_peak, model_state_bytes, start_communication

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "deepspeed": None,
    "coverage 1": {"coverage": 1.0},
    "coverage 3/4": {"coverage": 0.75},
    "coverage 1/2": {"coverage": 0.5},
    "coverage 1/2, blocks": {"coverage": 0.5, "granularity": "block"},
    "coverage 1/4": {"coverage": 0.25},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--bucket", type=int, default=200_000, help="reduce_bucket_size: small beside this small model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--local_rank", type=int, default=-1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    start_communication()
    deepspeed.utils.logger.setLevel("ERROR")
    rows = [run(args, stage, name) for stage in args.stages for name in CONTENDERS]
    if dist.get_rank() == 0:
        print(table(rows))
        if args.output:
            report = {"settings": describe(args), "rows": rows}
            args.output.write_text(json.dumps(report, indent=1) + "\n")


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
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 32,
            num_key_value_heads=args.hidden_size // 32,
            use_cache=False,
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": args.bucket},
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    if sdp is None:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    else:
        engine, *_ = deepspeed_sdp.initialize(model=model, config=config, sdp_config=sdp)
    return engine


def train(args: argparse.Namespace, engine: Any) -> None:
    ids = torch.randint(0, args.vocab_size, (1, 32)).to(engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def largest(value: float) -> float:
    """Over the ranks."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "local_rank")}
    return {
        **settings,
        "ranks": dist.get_world_size(),
        "device": get_accelerator().device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict[str, Any]]) -> str:
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
