"""How long a checkpoint keeps a job from training, and what it takes: beside plain DeepSpeed's.

    deepspeed --num_accelerators 4 benchmarks/checkpoint.py --output benchmarks/results/checkpoint.json

``stall`` is the time that ``save_checkpoint`` takes of the training, ``until saved`` that until the checkpoint is
complete on the disk while training goes on, ``slowdown`` a training step beside the writing, by a step without.
``load`` is the time of ``load_checkpoint``. Medians over ``--repetitions`` on the slowest rank; contenders alternate.
``written`` is of all ranks, ``copied`` what the fullest rank holds in copies on the CPU meanwhile, ``state`` its own
weights and optimizer, ``index`` what a rank reads to know where its tensors are.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines import Rows, build_engine, build_llama, largest, make_parser, report, start, step

from deepspeed_sdp.engine import model_state_bytes

HALF = {"coverage": 0.5}
IN_MEMORY = "coverage 1/2, in memory"
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "deepspeed, dense": None,
    "coverage 1/2": HALF,
    "coverage 1/2, 2 copies": {**HALF, "checkpoint": {"copies": 2}},
    "coverage 1/2, async": {**HALF, "checkpoint": {"async": True}},
    "coverage 1/2, async, 2 copies": {**HALF, "checkpoint": {"async": True, "copies": 2}},
    IN_MEMORY: HALF,
}


def main() -> None:
    parser = make_parser(__doc__, hidden_size=512, layers=8, vocab_size=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    start()
    folder: list[Any] = [None, None]
    if dist.get_rank() == 0:
        folder = [tempfile.mkdtemp(prefix="checkpoints-", dir=parent) for parent in (None, "/dev/shm")]
    dist.broadcast_object_list(folder)
    rows = [row for stage in args.stages for row in run(args, stage, *map(Path, folder))]
    dist.barrier()
    if dist.get_rank() == 0:
        for made in folder:
            shutil.rmtree(made)
    report(args, rows, table)


def run(args: argparse.Namespace, stage: int, folder: Path, memory: Path) -> Rows:
    engines = {name: build(args, stage, sdp) for name, sdp in CONTENDERS.items()}
    measured: dict[str, dict[str, list[float]]] = {
        name: {"stall": [], "until saved": [], "slowdown": [], "load": []} for name in engines
    }
    for engine in engines.values():
        train(args, engine)
    for _ in range(args.repetitions):
        for name, engine in engines.items():
            parent = memory if name == IN_MEMORY else folder
            one(args, engine, parent / str(stage) / name.replace(" ", "_"), measured[name], name == IN_MEMORY)
    rows = []
    for name, engine in engines.items():
        state = model_state_bytes(engine) if CONTENDERS[name] else None
        parent = (memory if name == IN_MEMORY else folder) / str(stage) / name.replace(" ", "_")
        [target] = [file.parent for file in parent.glob("*/manifest.json")] or [parent / "t"]
        written = sum(file.stat().st_size for file in target.iterdir())
        own = sum(file.stat().st_size for file in target.glob(f"tensors-{dist.get_rank():05d}*"))
        sdp = CONTENDERS[name] or {}
        index = [file.stat().st_size for file in target.glob("layout-*")]
        rows.append(
            {
                "stage": stage,
                "engine": name,
                **{key: statistics.median(values) for key, values in measured[name].items()},
                "written": written,
                "copied": largest(own if sdp.get("checkpoint", {}).get("async") or name == IN_MEMORY else 0),
                "index": max(index, default=None),
                "state": largest(state["weights"] + state["optimizer"]) if state else None,
            }
        )
        engine.destroy()
    return rows


def one(
    args: argparse.Namespace, engine: Any, folder: Path, measured: dict[str, list[float]], is_in_memory: bool
) -> None:
    """One checkpoint, with training beside it."""
    alone = timed(lambda: train(args, engine))
    save = engine.save_in_memory if is_in_memory else lambda path: engine.save_checkpoint(path, tag="t")
    measured["stall"].append(timed(lambda: save(str(folder))))
    began = time.perf_counter()
    beside = timed(lambda: train(args, engine))
    if hasattr(engine, "wait_for_checkpoint"):
        engine.wait_for_checkpoint()
    waited = largest(time.perf_counter() - began)
    sdp = getattr(engine, "sdp_config", None)
    is_async = is_in_memory or (sdp is not None and sdp.checkpoint.is_async)
    measured["until saved"].append(measured["stall"][-1] + (waited if is_async else 0.0))
    measured["slowdown"].append(beside / alone)
    load = engine.load_newest if is_in_memory else lambda path, _: engine.load_checkpoint(path, tag="t")
    measured["load"].append(timed(lambda: load(str(folder), str(folder / "none"))))


def timed(work: Any) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    return largest(time.perf_counter() - began)


def build(args: argparse.Namespace, stage: int, sdp: dict[str, Any] | None) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    return build_engine(build_llama(args, head_size=64), config, sdp)


def train(args: argparse.Namespace, engine: Any) -> None:
    step(engine, torch.randint(args.vocab_size, (1, 128)))


def table(rows: Rows) -> str:
    lines = [
        "| stage | engine | stall | until saved | slowdown | load | written | copied | state | index |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        state = f"{row['state'] / 1e6:.0f} MB" if row["state"] else "-"
        index = f"{row['index'] / 1e3:.1f} kB" if row["index"] else "-"
        lines.append(
            f"| {row['stage']} | {row['engine']} | {row['stall']:.2f} s | {row['until saved']:.2f} s | "
            f"{row['slowdown']:.2f} | {row['load']:.2f} s | {row['written'] / 1e6:.0f} MB | "
            f"{row['copied'] / 1e6:.0f} MB | {state} | {index} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
