"""SDP's engine beside plain DeepSpeed: step time, FLOPs, traffic and memory, alternated in one run.

    deepspeed --num_accelerators 4 benchmarks/engine_speed.py --output benchmarks/results/engine_speed.json

Per ZeRO stage it builds plain DeepSpeed and the SDP engines in one process and runs them in turn, a few steps each,
again and again; so a slow minute of the machine hits all of them alike. Ratios are medians over the repetitions of
(contender / plain DeepSpeed) in the same repetition; the spread is their interquartile range. FLOPs are counted by
``torch.utils.flop_counter`` over forward and backward pass, embeddings and head included.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_sdp
from deepspeed_sdp.engine import gradient_peak, model_state_bytes, start_communication

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "deepspeed": None,
    "coverage 1": {"coverage": 1.0},
    "coverage 1/2, all_to_all": {"coverage": 0.5, "transport": "all_to_all"},
    "coverage 1/2, owner_sets": {"coverage": 0.5, "transport": "owner_sets"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in each repetition")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--local_rank", type=int, default=-1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    start_communication()
    deepspeed.utils.logger.setLevel("ERROR")
    rows = []
    for stage in args.stages:
        rows += run_stage(args, stage)
    if dist.get_rank() == 0:
        report = {"settings": describe(args), "rows": rows}
        print(table(rows))
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")


def run_stage(args: argparse.Namespace, stage: int) -> list[dict[str, Any]]:
    names = [name for name in args.contenders if not (stage == 0 and "all_to_all" in name)]
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
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=args.hidden_size // 64,
            use_cache=False,
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": args.bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    if sdp is None:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    else:
        engine, *_ = deepspeed_sdp.initialize(model=model, config=config, sdp_config=sdp)
    return engine


def train(args: argparse.Namespace, engine: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        shape = (args.micro_batch, args.sequence)
        ids = torch.randint(0, args.vocab_size, shape, generator=generator).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    get_accelerator().synchronize()


def count_flops(args: argparse.Namespace, engine: Any) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        train(args, engine, 1)
    return float(counter.get_total_flops())


def mean(value: float) -> float:
    """Over the ranks."""
    total = torch.tensor(float(value), dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


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
