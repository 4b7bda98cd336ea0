"""What worker_capacity is worth: step time with one slow rank, units dealt by capacity and equally, in one run.

    deepspeed --num_accelerators 4 benchmarks/capacity.py --output benchmarks/results/capacity.json

The last rank does the matmuls of its linears over again, so that they take ``--slowdown`` times as long, whatever it
owns. Both engines run in turn, a few steps each; ratios are medians over the repetitions. On a machine with fewer cores
than ranks the wall clock shows less than CPU seconds of the slowest rank, which are what the others wait for.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from engines import Rows, build_engine, build_llama, make_parser, report, start, step
from torch import Tensor, nn

# Of a linear layer: one matmul in the forward pass, two in the backward pass.
_MATMULS = 3


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, hidden_size=256, layers=4, vocab_size=512)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each engine in each repetition")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--slowdown", type=int, default=3, help="of the last rank")
    return parser.parse_args()


def main() -> None:
    args = parse()
    start()
    report(args, [run_stage(args, stage) for stage in args.stages], table)


def run_stage(args: argparse.Namespace, stage: int) -> dict[str, Any]:
    capacity = [1.0] * (dist.get_world_size() - 1) + [1.0 / args.slowdown]
    plans: dict[str, dict[str, Any]] = {"equal": {}, "by capacity": {"worker_capacity": capacity}}
    engines = {name: build(args, stage, plan) for name, plan in plans.items()}
    wall: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        train(args, engine, 2)
    for repetition in range(args.repetitions):
        for name in list(engines)[:: 1 if repetition % 2 else -1]:
            dist.barrier()
            began, busy = time.perf_counter(), time.process_time()
            train(args, engines[name], args.steps)
            slowest = torch.tensor(time.process_time() - busy, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            cpu[name].append(float(slowest) / args.steps)
            wall[name].append((time.perf_counter() - began) / args.steps)
    result = {"stage": stage, "ranks": dist.get_world_size(), "slowdown": args.slowdown}
    for key, seconds in (("wall", wall), ("cpu_of_the_slowest_rank", cpu)):
        ratios = [b / a for a, b in zip(seconds["equal"], seconds["by capacity"], strict=True)]
        result[key] = {name: statistics.median(values) for name, values in seconds.items()}
        result[f"{key}_ratio"] = statistics.median(ratios)
        result[f"{key}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    for engine in engines.values():
        engine.destroy()
    return result


def build(args: argparse.Namespace, stage: int, plan: dict[str, Any]) -> Any:
    config = {"train_micro_batch_size_per_gpu": args.micro_batch, "zero_optimization": {"stage": stage}}
    engine = build_engine(build_llama(args, head_size=32), config, {"coverage": 0.5, "plan": plan})
    if dist.get_rank() == dist.get_world_size() - 1:
        for module in engine.module.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, inputs, _: again(m, inputs[0], _MATMULS * (args.slowdown - 1)))
    return engine


@torch.no_grad()
def again(linear: nn.Linear, inputs: Tensor, times: int) -> None:
    for _ in range(times):
        nn.functional.linear(inputs, linear.weight)


def train(args: argparse.Namespace, engine: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        step(engine, torch.randint(0, args.vocab_size, (args.micro_batch, args.sequence), generator=generator))


def table(rows: Rows) -> str:
    lines = [
        "| ZeRO | ranks | slowdown | wall, by capacity / equal | CPU of the slowest rank |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        shown = [
            f"{r[f'{key}_ratio']:.2f} ({r[f'{key}_quartiles'][0]:.2f} to {r[f'{key}_quartiles'][1]:.2f})"
            for key in ("wall", "cpu_of_the_slowest_rank")
        ]
        lines.append(f"| {r['stage']} | {r['ranks']} | {r['slowdown']} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
