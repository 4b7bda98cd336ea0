"""Cost along one axis at a time beside the design's formulas: model size, N, coverage, sequence, micro-batch, link.

    make bench-systems
    python benchmarks/systems/launch.py --ranks 4 benchmarks/systems/sweep.py --output benchmarks/results/sweep.json
    python benchmarks/systems/launch.py --ranks 2 benchmarks/systems/sweep.py --axes workers \\
        --output benchmarks/results/sweep_2.json

Every point measures plain DeepSpeed with ZeRO-1 and SDP (forward masking of neurons, coverage 1/2, ZeRO-1) on the same
model and tokens. ``N`` is the number of ranks, so its axis takes a start for each. On the axis of the link every rank
has one of its own, limited by ``tc`` to a rate each way, and FSDP2, ZeRO-3 and coverage 1/4 are measured too.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator

import torch.distributed as dist
from contenders import Contender, sdp
from job import Report, make_parser, say, schedule_of, start, workload_of
from link import has_link
from measure import Case, Schedule, run
from sweep_tables import EVERY, link_table, sweep_table
from workload import Workload

from deepspeed_sdp.errors import ConfigError, SDPError

DENSE = Contender("deepspeed", 1)
HALF = sdp("forward", "neuron", "1/2", 1)
AXES = ("size", "coverage", "sequence", "micro_batch", "link", "workers")
# Bytes per second each way.
RATES = (None, 1e9, 0.25e9, 0.1e9)
ON_A_LINK = (DENSE, Contender("fsdp2"), Contender("deepspeed", 3), HALF, sdp("forward", "neuron", "1/4", 1))
AROUND = (0.5, 1.0, 1.5, 2.0)


def main() -> int:
    parser = make_parser(__doc__, Workload(), Schedule())
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES[:-1]))
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="MB_PER_S", help="of the link, in 10^6 bytes per second each way"
    )
    args = parser.parse_args()
    try:
        check(args)
        base = workload_of(args)
    except SDPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start(args)
    report = Report(args, base)
    cases = [case for axis in args.axes for case in points(axis, base, args)]
    run(cases, schedule_of(args), say, report.keep)
    say("\n\n".join(filter(None, (sweep_table([report.results]), link_table(report.results)))))
    dist.destroy_process_group()
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: a rate that is none, or an axis that takes links where there are none.
    """
    wrong = [rate for rate in args.rates or () if not rate > 0]
    if wrong:
        raise ConfigError(f"--rates: got {wrong[0]}; takes numbers above 0, in 10^6 bytes per second")
    if "link" in args.axes and not has_link():
        args.axes.remove("link")
        if os.environ.get("RANK", "0") == "0":
            print("sweep.py: link: left out, takes a start by launch.py where it can make namespaces", flush=True)
    if not args.axes:
        raise ConfigError("--axes: got link alone; takes another axis too where ranks have no links of their own")


def points(axis: str, base: Workload, args: argparse.Namespace) -> Iterator[Case]:
    """The cases along one axis; with ``--quick`` its ends alone."""
    if axis == "coverage":
        yield Case(DENSE, base, labels={"axis": axis, "at": EVERY})
        for coverage in _ends(("1/4", "1/2", "3/4", "1"), args):
            yield Case(sdp("forward", "neuron", coverage, 1), base, labels={"axis": axis, "at": coverage})
        for coverage in _ends(("1/4", "1/2", "3/4"), args):
            labels = {"axis": "coverage, backward", "at": coverage}
            yield Case(sdp("backward", "neuron", coverage, 1), base, labels=labels)
    elif axis == "link":
        rates = (None, *(1e6 * rate for rate in args.rates)) if args.rates else RATES
        for rate in _ends(rates, args):
            for contender in ON_A_LINK:
                yield Case(contender, base, rate, {"axis": axis, "at": "unlimited" if rate is None else rate})
    else:
        for at, workload in _ends(_workloads(axis, base), args):
            for contender in (DENSE, HALF):
                yield Case(contender, workload, labels={"axis": axis, "at": at})


def _workloads(axis: str, base: Workload) -> list[tuple[int, Workload]]:
    if axis == "workers":
        return [(dist.get_world_size(), base)]
    name = {"size": "hidden_size"}.get(axis, axis)
    step = base.head_size * 4 if axis == "size" else 1
    found = {max(step, round(getattr(base, name) * factor / step) * step) for factor in AROUND}
    return [(value, dataclasses.replace(base, **{name: value})) for value in sorted(found)]


def _ends(values, args):  # type: ignore[no-untyped-def]
    return [values[0], values[-1]] if args.quick and len(values) > 1 else list(values)


if __name__ == "__main__":
    sys.exit(main())
