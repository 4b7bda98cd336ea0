"""One rank of the processes that run checks of a group, one after the other. Started by ``python -m benchmarks.gpu``.

The first rank appends a row to ``--rows`` as each check begins and as it ends. A check that fails ends all ranks: what
it left behind, on the device too, must not reach the next one.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from job import start
from systems import free

from benchmarks.gpu.checks import CHECKS, FAKED_PEERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", required=True)
    parser.add_argument("--checks", nargs="+", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args()
    args.fake_peers = FAKED_PEERS if args.group == "alone" else 0
    start(args)
    checks = {check.name: check for check in CHECKS}
    for name in args.checks:
        if dist.get_rank() == 0:
            _append(args.rows, {"check": name, "state": "begun"})
        module, function = checks[name].call.split(":")
        began = time.perf_counter()
        try:
            call = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
            figures = call(**checks[name].arguments)
        except BaseException as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0]
            said = f"rank {dist.get_rank()}: {type(error).__name__}: {reason}"[:400]
            _append(args.rows, {"check": name, "state": "failed", "says": said})
            sys.stderr.flush()
            os._exit(1)
        free()
        if dist.get_rank() == 0:
            seconds = round(time.perf_counter() - began, 2)
            _append(args.rows, {"check": name, "state": "passed", "seconds": seconds, **figures})
    dist.destroy_process_group()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
