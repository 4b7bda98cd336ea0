"""Step time on slow links, with gradients averaged in every step and with local steps.

    python benchmarks/systems/launch.py --ranks 4 benchmarks/systems/local_steps.py \\
        --output benchmarks/results/local_steps.json

Every rank has a link of its own, limited by ``tc`` to a rate each way. A round of ``H`` steps and its agreement is
timed as a whole; with ``H = 1`` two steps are. Bytes are those that the kernel counts on the rank's interface.
"""

import sys
import time
from typing import Any

import torch.distributed as dist
from contenders import Contender
from job import Report, make_parser, say, start, workload_of
from link import has_link, set_rate
from measure import Schedule
from systems import build, free
from traffic import interface_bytes
from workload import Workload

RATES = (1, 10, 100)
INTERVALS = (1, 10, 50)
OUTER = {"outer_optimizer": {"lr": 0.7, "momentum": 0.9}}


def main() -> int:
    defaults = Workload(hidden_size=128, layers=4, head_size=32, vocab_size=1024, sequence=64, micro_batch=1)
    parser = make_parser(__doc__, defaults, Schedule())
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), metavar="MB_PER_S")
    args = parser.parse_args()
    if not has_link():
        print("local_steps.py: takes a start by launch.py where it can make namespaces", file=sys.stderr)
        return 1
    workload = workload_of(args)
    start(args)
    report = Report(args, workload)
    rows: list[dict[str, Any]] = []
    for coverage in (1.0, 0.5):
        for interval in INTERVALS[:2] if args.quick else INTERVALS:
            schedule = {"sync_interval": interval, **(OUTER if interval > 1 else {})}
            block = {"coverage": coverage, "schedule": schedule}
            contender = Contender("sdp", 0, "1" if coverage == 1.0 else "1/2", block)
            for rate in args.rates[:1] if args.quick else args.rates:
                rows.append(run(contender, workload, interval, rate))
                report.keep(rows)
                say(line(rows[-1]))
    if dist.get_rank() == 0:
        print(table(rows))
    dist.destroy_process_group()
    return 0


def run(contender: Contender, workload: Workload, interval: int, rate: float) -> dict[str, Any]:
    """Seconds and bytes per step, on the slowest rank."""
    system = build(contender, workload)
    steps = max(2, interval)

    def go() -> None:
        for step in range(steps):
            system.step(workload.batch(dist.get_rank(), step))

    go()
    set_rate(rate * 1e6)
    dist.barrier()
    wire, began = interface_bytes(), time.perf_counter()
    go()
    dist.barrier()
    seconds, sent = time.perf_counter() - began, (interface_bytes() or 0) - (wire or 0)
    set_rate(None)
    system.close()
    free()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (seconds / steps, sent / steps))
    return {
        "coverage": contender.coverage,
        "interval": interval,
        "rate": rate,
        "seconds": max(of for of, _ in of_ranks),
        "sent": max(of for _, of in of_ranks),
    }


def line(row: dict[str, Any]) -> str:
    """For the console."""
    return f"coverage {row['coverage']}, H = {row['interval']}, {row['rate']:g} MB/s: {row['seconds']:.3f} s per step"


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown: seconds per step by rate."""
    rates = sorted({row["rate"] for row in rows})
    lines = [
        f"| coverage | `sync_interval` | kB sent per step | {' | '.join(f's at {rate:g} MB/s' for rate in rates)} |"
    ]
    lines.append("| --- " * (3 + len(rates)) + "|")
    for key in dict.fromkeys((row["coverage"], row["interval"]) for row in rows):
        of = {row["rate"]: row for row in rows if (row["coverage"], row["interval"]) == key}
        sent = max(row["sent"] for row in of.values()) / 1e3
        seconds = " | ".join(f"{of[rate]['seconds']:.3f}" for rate in rates)
        lines.append(f"| {key[0]} | {key[1]} | {sent:.0f} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
