"""``report``: what a finished run left."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.config import read_json

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

    data = read_json(args.folder / "report.json", "report")
    print(json.dumps(data, indent=2) if args.json else to_markdown(data))
