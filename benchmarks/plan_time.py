"""CPU seconds to search designs and to plan a large LLaMA in neurons and in branches.

python benchmarks/plan_time.py --results benchmarks/results/plan_time.json
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

from deepspeed_sdp.options import OptionParser
from deepspeed_sdp.plan import UnitSpace, make_design, make_plan

DESIGNS = ((8, 4), (12, 3), (24, 4), (64, 32))
PLANS = ((8, 3), (16, 8), (512, 256), (512, 192), (510, 85), (4096, 2048))


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="of which the median counts")
    parser.add_argument("--results", type=Path, metavar="JSON", help="write the figures into this file")
    args = parser.parse_args()
    make_design("auto", 4, 2)
    rows = {}
    for n, k in DESIGNS:
        rows[f"design {n} {k}"] = seconds(lambda n=n, k=k: make_design("auto", n, k), args.repetitions)
    for (n, k), (granularity, spaces) in itertools.product(PLANS, {"neurons": llama, "branches": branches}.items()):
        plan = lambda n=n, k=k, spaces=spaces: make_plan(spaces(80), n, owners_per_unit=k)  # noqa: E731
        rows[f"plan of 80 layers in {granularity} {n} {k}"] = seconds(plan, args.repetitions)
    for name, value in rows.items():
        print(f"{name:<44}{value:8.3f} s")
    if args.results:
        command = f"python benchmarks/plan_time.py --repetitions {args.repetitions}"
        about = {"command": command, "date": f"{date.today()}", "python": platform.python_version()}
        args.results.write_text(json.dumps({**about, "cpu_seconds": rows}, indent=2) + "\n", encoding="utf-8")


def seconds(work: Callable[[], object], repetitions: int) -> float:
    taken = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def llama(layers: int) -> list[UnitSpace]:
    """The spaces of a LLaMA with hidden size 4 096, 8 KV heads of 4 query heads each, and 11 008 neurons."""
    spaces = []
    for layer in range(layers):
        spaces.append(UnitSpace(f"model.layers.{layer}.self_attn", "attention", layer, 8, 4096 * 128 * 10))
        spaces.append(UnitSpace(f"model.layers.{layer}.mlp", "mlp", layer, 11008, 3 * 4096))
    return spaces


def branches(layers: int) -> list[UnitSpace]:
    """The same with whole branches as units."""
    return [replace(s, num_units=1, unit_numel=s.numel) for s in llama(layers)]


if __name__ == "__main__":
    main()
