"""SDP beside DDP, activation checkpointing, FSDP2 and ZeRO: memory by kind, time, traffic and FLOPs of one step.

    make bench-systems
    python benchmarks/systems/launch.py --ranks 4 benchmarks/systems/run.py --output benchmarks/results/systems.json
    deepspeed --num_accelerators 4 benchmarks/systems/run.py --output benchmarks/results/systems.json

Same model, same tokens, same ranks, same optimizer (torch's AdamW, clipping at 1). Contenders run in turn in one set of
processes, round by round, so that a slow minute of the machine hits all of them alike: each is built, warmed up,
timed and destroyed. Peak memory, FLOPs and traffic are measured in the first round, in steps that are not timed.
"""

import argparse
import sys

import torch.distributed as dist
from contenders import CONTENDERS
from job import Report, make_parser, say, schedule_of, start, workload_of
from measure import Case, Schedule, run
from tables import contender_table
from workload import Workload

from deepspeed_sdp.errors import ConfigError, SDPError


def main() -> int:
    parser = make_parser(__doc__, Workload(), Schedule())
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="some of them, by name or a part of it")
    args = parser.parse_args()
    try:
        workload, names = workload_of(args), chosen(args)
    except SDPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start(args)
    report = Report(args, workload)
    cases = [Case(CONTENDERS[name], workload) for name in names]
    run(cases, schedule_of(args), say, report.keep)
    say(contender_table(report.results))
    dist.destroy_process_group()
    return 0


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of contenders.

    Raises:
        ConfigError: none is called so.
    """
    if not args.contenders:
        return [name for name, contender in CONTENDERS.items() if contender.is_core or not args.quick]
    for part in args.contenders:
        if not any(part in name for name in CONTENDERS):
            raise ConfigError(f"--contenders: got {part!r}; takes parts of: {', '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if any(part in name for part in args.contenders)]


if __name__ == "__main__":
    sys.exit(main())
