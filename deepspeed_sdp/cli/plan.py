"""``plan``: who would own what of a model."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.cli.options import coverage, listed, per_kind, written
from deepspeed_sdp.config import SDPConfig, read_block
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.presets import model_path, preset_names

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands

# Options that are keys of the SDP block, and of its block "plan".
_OPTIONS = (
    "masking", "num_subnetworks", "coverage", "granularity", "partition", "shared_modules", "share_ends",
)  # fmt: skip
_PLAN_OPTIONS = ("design", "worker_capacity", "max_owner_sets", "chunk_multiple", "seq_length", "seed")


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
    plan = commands.add_parser("plan", help="who would own what of a model")
    plan.add_argument(
        "--model",
        required=True,
        help="HuggingFace config.json, a folder with one, or a preset: " + ", ".join(preset_names()),
    )
    plan.add_argument("--sdp_config", metavar="JSON", help="an SDP block to start from; the options below override it")
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks; default: the workers, or else 8")
    plan.add_argument(
        "--num_subnetworks",
        type=int,
        metavar="N",
        help="workers; default: the block's, or else the largest divisor of the ranks up to 8",
    )
    plan.add_argument(
        "--coverage",
        type=per_kind(coverage),
        metavar="C",
        help="K/N, e.g. 0.5, 1/2 or mlp=0.5,attention=0.75 (default: 0.5)",
    )
    plan.add_argument("--masking", choices=("forward", "backward"), help="of units not owned (default: forward)")
    plan.add_argument("--granularity", choices=("neuron", "branch", "layer"), help="what a unit is (default: neuron)")
    plan.add_argument("--partition", type=listed(str), metavar="KINDS", help="mlp, attention or mlp,attention")
    plan.add_argument("--shared_modules", nargs="+", metavar="PATTERN", help="modules that all workers own")
    plan.add_argument("--share_ends", type=int, metavar="L", help="first and last layers that all workers own")
    plan.add_argument("--design", choices=("auto", "cyclic", "random"), help="how owner sets are chosen")
    plan.add_argument("--worker_capacity", type=listed(float), metavar="C,C,...", help="relative speeds of the workers")
    plan.add_argument(
        "--max_owner_sets", type=int, metavar="M", help="bound on process groups (default: 16 up to 8 workers)"
    )
    plan.add_argument("--chunk_multiple", type=int, metavar="M", help="alignment of chunks (default: 64)")
    plan.add_argument("--seq_length", type=int, metavar="T", help="for the balance of FLOPs (default: 2048)")
    plan.add_argument("--seed", type=int, help="of searched and random designs (default: 0)")
    plan.add_argument("--json", action="store_true", help="print the summary as JSON")
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the plan, for plan.file of the SDP block")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw workers by layers, and the loads")
    plan.add_argument("--rounds", type=int, metavar="R", help="draw R rounds of schedule.resample_interval instead")
    plan.add_argument("--resample", choices=("rotate", "random"), default="rotate", help="how; default: %(default)s")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from deepspeed_sdp.report import count_parameters, plan_summary, plot_plan, plot_rounds, to_text
    from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config

    block = read_block(args.sdp_config, "--sdp_config") if args.sdp_config else {}
    block |= {key: getattr(args, key) for key in _OPTIONS if getattr(args, key) is not None}
    said = {key: getattr(args, key) for key in _PLAN_OPTIONS if getattr(args, key) is not None}
    if said:
        block["plan"] = {**block.get("plan", {}), **said}
    config = SDPConfig.parse(block)
    model = meta_model(read_model_config(model_path(args.model, "--model"), "--model"), "--model")
    plan = plan_for(model, config, args.gpus or config.num_subnetworks or 8)
    summary = plan_summary(plan, count_parameters(model), config.masking)
    print(json.dumps(summary, indent=2) if args.json else to_text(summary))
    if args.out:
        written(args.out, lambda path: path.write_text(plan.to_json(indent=2) + "\n", encoding="utf-8"))
    if args.rounds is not None and (args.rounds < 1 or not args.plot):
        raise ConfigError(f"--rounds: got {args.rounds}; takes a number from 1 on, and --plot for the picture")
    if args.rounds is not None:
        rounds = [plan.resampled(number, args.resample) for number in range(args.rounds)]
        written(args.plot, lambda path: plot_rounds(rounds, path))
    elif args.plot:
        written(args.plot, lambda path: plot_plan(plan, path))
