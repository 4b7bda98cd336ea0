"""What the benchmarks of systems share as programs: options, start of the ranks, and the results file."""

import argparse
import contextlib
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from compute import matmul_ceiling
from deepspeed.accelerator import get_accelerator
from link import has_link
from measure import Schedule
from workload import Workload

from deepspeed_sdp.engine import start_communication
from deepspeed_sdp.engine.deepspeed.start import clear_stale_locks
from deepspeed_sdp.errors import ConfigError, OutputError
from deepspeed_sdp.options import OptionParser


def make_parser(description: str | None, defaults: Workload, schedule: Schedule) -> argparse.ArgumentParser:
    """Options of every program here."""
    parser = OptionParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hidden_size", "layers", "head_size", "vocab_size", "sequence", "micro_batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=defaults.precision)
    parser.add_argument("--rounds", type=int, default=schedule.rounds)
    parser.add_argument("--warmup", type=int, default=schedule.warmup, help="steps before the timed ones of a round")
    parser.add_argument("--steps", type=int, default=schedule.steps, help="timed steps of a contender in a round")
    parser.add_argument("--quick", action="store_true", help="a few contenders, once: does it run?")
    parser.add_argument(
        "--fake_peers", type=int, default=0, help="one process among so many ranks, all others faked: memory, compute"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--local_rank", type=int, default=-1)
    return parser


def workload_of(args: argparse.Namespace) -> Workload:
    """The model and tokens that the options ask for.

    Raises:
        ConfigError: sizes that do not fit together.
        OutputError: the results could not be written, in the end.
    """
    _check_output(args.output)
    for name in ("hidden_size", "layers", "head_size", "vocab_size", "sequence", "micro_batch", "rounds", "steps"):
        value = getattr(args, name)
        least = 2 if name in ("sequence", "vocab_size") else 1
        if value < least:
            raise ConfigError(f"--{name}: got {value}; takes a number from {least} on")
    if args.hidden_size % args.head_size or args.head_size % 2:
        raise ConfigError(
            f"--head_size: got {args.head_size} with --hidden_size {args.hidden_size}; takes an even divisor of it"
        )
    return Workload(
        hidden_size=args.hidden_size,
        layers=args.layers,
        head_size=args.head_size,
        vocab_size=args.vocab_size,
        sequence=args.sequence,
        micro_batch=args.micro_batch,
        precision=args.precision,
    )


def _check_output(path: Path | None) -> None:
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"--output: got {path}; takes a file in a folder that can be written")


def schedule_of(args: argparse.Namespace) -> Schedule:
    """How much the options ask to measure."""
    return Schedule(1, args.warmup, 1) if args.quick else Schedule(args.rounds, args.warmup, args.steps)


def start(args: argparse.Namespace) -> None:
    """Once per process: join the ranks. More ranks than accelerators share them, over gloo."""
    # FSDP2 and DeepSpeed call collectives by names that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    accelerator = get_accelerator()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if args.fake_peers:
        _start_faked(args.fake_peers)
    elif accelerator.device_name() != "cpu" and ranks > accelerator.device_count():
        _start_shared(accelerator)
    else:
        start_communication()
    deepspeed.utils.logger.setLevel("ERROR")
    # What was imported stays: collecting after every system need not look at it again.
    gc.collect()
    gc.freeze()


def _start_shared(accelerator: Any) -> None:
    # NCCL takes one rank per device; DeepSpeed takes the device of the local rank.
    local = int(os.environ["LOCAL_RANK"]) % accelerator.device_count()
    os.environ["LOCAL_RANK"] = str(local)
    clear_stale_locks()
    accelerator.set_device(local)
    # DeepSpeed would bind the group to the device, as NCCL's are.
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_init_required=False)


def _start_faked(ranks: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)


def say(line: str) -> None:
    """Progress, once."""
    if dist.get_rank() == 0:
        print(line, flush=True)


class Report:
    """The results file: what the figures were measured with, and rows so far.

    Args:
        args: options of the program; ``output`` is the file.
        workload: whose matmuls are the ceiling.
    """

    def __init__(self, args: argparse.Namespace, workload: Workload) -> None:
        self._output, self._workload = args.output, workload
        self.results: dict[str, Any] = {"settings": _settings(args), "rows": []}
        self._ceilings = [matmul_ceiling(workload)]

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Collective, after a round. The ceiling is measured again, as the machine's minutes differ."""
        self._ceilings.append(matmul_ceiling(self._workload))
        self.results["settings"]["matmul_ceiling"] = statistics.median(self._ceilings)
        self.results["rows"] = rows
        if self._output and dist.get_rank() == 0:
            _write(self._output, self.results)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    options = {k: v for k, v in vars(args).items() if k not in ("local_rank", "output")}
    return {
        "command": os.environ.get("SYSTEMS_COMMAND") or shlex.join(["python", *sys.argv]),
        "options": options,
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "faked_peers": bool(args.fake_peers),
        "network": "a network namespace per rank" if has_link() else "loopback",
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    staging = path.with_suffix(path.suffix + ".part")
    staging.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(staging, path)


def _hardware() -> dict[str, Any]:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    hardware = {"device": get_accelerator().device_name(), "cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    if get_accelerator().device_name() != "cpu":
        hardware["accelerator"] = torch.cuda.get_device_name()
        hardware["accelerators"] = get_accelerator().device_count()
    return hardware


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
