"""The console script ``deepspeed-sdp``: what can be known without a job."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeed_sdp.config import SDPConfig, read_json
from deepspeed_sdp.errors import ConfigError, SDPError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. An error is one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except SDPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed-sdp", description="Plans and reports of Subnetwork Data Parallelism"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="who would own what of a model")
    plan.add_argument("--model", required=True, metavar="PATH", help="HuggingFace config.json, or a folder with one")
    plan.add_argument("--sdp_config", metavar="JSON", help="an SDP block to start from; the options below override it")
    plan.add_argument("--num-subnetworks", type=int, required=True, metavar="N", help="workers")
    plan.add_argument("--coverage", type=float, help="share of the units that one worker holds")
    plan.add_argument("--owners-per-unit", type=int, metavar="K", help="workers that own a unit, instead of coverage")
    plan.add_argument("--design", choices=("auto", "cyclic", "random"), help="how owner sets are chosen")
    plan.add_argument("--json", action="store_true", help="print the summary as JSON")
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the whole plan as JSON")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw workers by layers")
    plan.set_defaults(run=_plan)
    report = commands.add_parser("report", help="show the report of a finished run")
    report.add_argument("folder", type=Path, help="output folder of a run, with its report.json")
    report.add_argument("--json", action="store_true", help="print report.json as it is")
    report.set_defaults(run=_report)
    return parser


def _plan(args: argparse.Namespace) -> None:
    from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config

    block = read_json(args.sdp_config, "--sdp_config") if args.sdp_config else {}
    if args.coverage is not None or args.owners_per_unit is not None:
        block.pop("coverage", None)
        block.pop("owners_per_unit", None)
    options = {key: getattr(args, key) for key in ("num_subnetworks", "coverage", "owners_per_unit", "design")}
    block.update({key: value for key, value in options.items() if value is not None})
    config = SDPConfig.parse(block)
    plan = plan_for(meta_model(read_model_config(args.model, "--model"), "--model"), config, args.num_subnetworks)
    owned = [plan.owned_numel(worker) for worker in range(plan.num_subnetworks)]
    summary = {**plan.summary(), "partitioned_parameters": plan.total_numel, "owned_per_worker": owned}
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        width = max(map(len, summary))
        print("\n".join(f"{key:<{width}}  {_readable(value)}" for key, value in summary.items()))
    try:
        if args.out:
            args.out.write_text(plan.to_json(indent=2) + "\n", encoding="utf-8")
        if args.plot:
            from deepspeed_sdp.report import plot_plan

            plot_plan(plan, args.plot)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None


def _report(args: argparse.Namespace) -> None:
    from deepspeed_sdp.report import to_markdown

    data = read_json(args.folder / "report.json", "report")
    print(json.dumps(data, indent=2) if args.json else to_markdown(data))


def _readable(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(f"{item:,}" for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
