"""``report``: what a finished run left."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
    report = commands.add_parser("report", help="show the report of a finished run")
    report.add_argument("folder", type=Path, help="output folder of a run, with its report.json")
    report.add_argument("--json", action="store_true", help="print report.json as it is")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from deepspeed_sdp.report import to_markdown
    from deepspeed_sdp.report.report_file import read_report, with_nan

    data = read_report(args.folder)
    if args.json:
        print(json.dumps(data, indent=2))
        return
    try:
        page = to_markdown(with_nan(data))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # of another version
        raise ConfigError(f"{args.folder / 'report.json'}: is no report of this version: {error!r}") from None
    print(page)
