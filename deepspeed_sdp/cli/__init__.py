"""The console script ``deepspeed-sdp``. One file per group of subcommands."""

import argparse
import sys
from collections.abc import Sequence

from deepspeed_sdp.cli import checkpoints, data, estimate, models, plan, pretrain, report
from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.options import OptionParser
from deepspeed_sdp.pretraining.options import parse_run


def make_parser() -> OptionParser:
    """The parser of all subcommands."""
    parser = OptionParser(
        prog="deepspeed-sdp", description="Plans, estimates, jobs and reports of Subnetwork Data Parallelism"
    )
    # DeepSpeed's launcher puts it before what a rank was given.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (plan, estimate, data, pretrain, checkpoints, models, report):
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. An error is one line on stderr."""
    command, parser = list(sys.argv[1:] if argv is None else argv), make_parser()
    args = parse_run(parser, command)
    if args.settings and args.run is not pretrain.run:
        parser.error(f"unrecognized arguments: --{args.settings[0][0]}")
    args.command = command
    try:
        args.run(args)
    except SDPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
