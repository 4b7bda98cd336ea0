"""The console script ``deepspeed-sdp``: what can be known or made without a job. One file per group of subcommands."""

import sys
from collections.abc import Sequence

from deepspeed_sdp.cli import checkpoints, data, estimate, models, plan, report
from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.options import OptionParser


def make_parser() -> OptionParser:
    """The parser of all subcommands."""
    parser = OptionParser(
        prog="deepspeed-sdp", description="Plans, estimates and reports of Subnetwork Data Parallelism"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (plan, estimate, data, checkpoints, models, report):
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. An error is one line on stderr."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except SDPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
