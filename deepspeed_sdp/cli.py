"""The console script ``deepspeed-sdp``: what can be known without a job."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed_sdp.config import SDPConfig, read_json
from deepspeed_sdp.errors import ConfigError, OutputError, SDPError

# Options of ``plan`` that are keys of the SDP block.
_BLOCK_OPTIONS = (
    "masking", "num_subnetworks", "coverage", "owners_per_unit", "granularity", "block_unit", "partition",
    "shared_modules", "design", "worker_capacity", "max_owner_sets", "chunk_multiple", "seq_length", "seed",
)  # fmt: skip


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
    plan.add_argument(
        "--model",
        required=True,
        help="HuggingFace config.json, a folder with one, or a preset: " + ", ".join(presets()),
    )
    plan.add_argument("--sdp_config", metavar="JSON", help="an SDP block to start from; the options below override it")
    plan.add_argument("--num-subnetworks", type=int, metavar="N", help="workers; default: the block's")
    plan.add_argument(
        "--coverage", type=_per_kind(float), metavar="C", help="K/N, e.g. 0.5 or mlp=0.5,attention=0.75 (default: 0.5)"
    )
    plan.add_argument(
        "--owners-per-unit", type=_per_kind(int), metavar="K", help="K instead of coverage, e.g. 4 or mlp=4,attention=6"
    )
    plan.add_argument("--masking", choices=("forward", "backward"), help="of units not owned (default: forward)")
    plan.add_argument("--granularity", choices=("neuron", "block"), help="what a unit is (default: neuron)")
    plan.add_argument("--block-unit", choices=("layer", "branch"), help="at block granularity (default: layer)")
    plan.add_argument("--partition", type=_listed(str), metavar="KINDS", help="mlp, attention or mlp,attention")
    plan.add_argument("--shared-modules", nargs="+", metavar="PATTERN", help="modules that all workers own")
    plan.add_argument("--design", choices=("auto", "cyclic", "random"), help="how owner sets are chosen")
    plan.add_argument(
        "--worker-capacity", type=_listed(float), metavar="C,C,...", help="relative speeds of the workers"
    )
    plan.add_argument("--max-owner-sets", type=int, metavar="M", help="bound on process groups (default: 64)")
    plan.add_argument("--chunk-multiple", type=int, metavar="M", help="alignment of chunks (default: 64)")
    plan.add_argument("--seq-length", type=int, metavar="T", help="for the balance of FLOPs (default: 2048)")
    plan.add_argument("--seed", type=int, help="of searched and random designs (default: 0)")
    plan.add_argument("--json", action="store_true", help="print the summary as JSON")
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the plan, for the SDP block's plan_file")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw workers by layers, and the loads")
    plan.set_defaults(run=_plan)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("folder", type=Path, help="a checkpoint, or a folder of checkpoints (the latest counts)")
    inspect.add_argument("--tag", help="of which checkpoint in the folder")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="the full model of a checkpoint as a HuggingFace folder")
    export.add_argument("folder", type=Path, help="a checkpoint, or a folder of checkpoints (the latest counts)")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--tag", help="of which checkpoint in the folder")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: that of training)")
    export.add_argument("--subnetwork", type=int, metavar="W", help="worker W's subnetwork, as a smaller model")
    export.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="a tokenizer to copy into the folder")
    export.add_argument(
        "--universal", action="store_true", help="weights and optimizer in DeepSpeed's universal format instead"
    )
    export.set_defaults(run=_export)
    models = commands.add_parser("models", help="list the model families that can be partitioned")
    models.add_argument("--json", action="store_true", help="JSON instead of a table")
    models.set_defaults(run=_models)
    report = commands.add_parser("report", help="show the report of a finished run")
    report.add_argument("folder", type=Path, help="output folder of a run, with its report.json")
    report.add_argument("--json", action="store_true", help="print report.json as it is")
    report.set_defaults(run=_report)
    return parser


def presets() -> list[str]:
    """Names of the model configurations that come with the package."""
    return sorted(path.stem for path in _preset_folder().glob("*.json"))


def _preset_folder() -> Path:
    return Path(__file__).parent / "presets"


def _plan(args: argparse.Namespace) -> None:
    from deepspeed_sdp.report import plan_summary, plot_plan, to_text
    from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config

    block = read_json(args.sdp_config, "--sdp_config") if args.sdp_config else {}
    if args.coverage is not None or args.owners_per_unit is not None:
        block.pop("coverage", None)
        block.pop("owners_per_unit", None)
    block.update({key: getattr(args, key) for key in _BLOCK_OPTIONS if getattr(args, key) is not None})
    config = SDPConfig.parse(block)
    if config.num_subnetworks is None:
        raise ConfigError(
            "--num-subnetworks: got none, and no num_subnetworks in the SDP block; takes the number of workers"
        )
    preset = _preset_folder() / f"{args.model}.json"
    path = preset if preset.is_file() and not Path(args.model).exists() else Path(args.model)
    if not path.exists():
        raise ConfigError(f"--model: {args.model} is no file, folder or preset; presets are {', '.join(presets())}")
    model = meta_model(read_model_config(path, "--model"), "--model")
    plan = plan_for(model, config, config.num_subnetworks)
    summary = plan_summary(plan, sum(parameter.numel() for parameter in model.parameters()), config.masking)
    print(json.dumps(summary, indent=2) if args.json else to_text(summary))
    for path, write in (
        (args.out, lambda: args.out.write_text(plan.to_json(indent=2) + "\n", encoding="utf-8")),
        (args.plot, lambda: plot_plan(plan, args.plot)),
    ):
        try:
            if path:
                write()
        except (OSError, ValueError) as error:  # matplotlib raises ValueError for a suffix it does not know
            raise OutputError(f"cannot write {path}: {error}") from None


def _inspect(args: argparse.Namespace) -> None:
    from deepspeed_sdp.checkpoint.summary import locate, summarize

    summary = summarize(locate(args.folder, args.tag), args.verify)
    if args.json:
        print(json.dumps(summary, indent=2))
        return
    for key, value in summary.items():
        shown = ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else value
        print(f"{key:<12}{shown}")


def _export(args: argparse.Namespace) -> None:
    import torch

    from deepspeed_sdp.checkpoint.export import export
    from deepspeed_sdp.checkpoint.summary import locate

    if args.universal:
        from deepspeed_sdp.checkpoint.universal_export import export_universal

        said = [key for key in ("dtype", "tokenizer", "subnetwork") if getattr(args, key) is not None]
        if said:
            raise ConfigError(f"--universal: got --{said[0]} too; takes neither, it is the state of a training")
        print(f"universal checkpoint: {export_universal(locate(args.folder, args.tag), args.out)}")
        return
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    export(locate(args.folder, args.tag), args.out, dtypes[args.dtype], args.tokenizer, args.subnetwork)
    print(f"model: {args.out}")


def _models(args: argparse.Namespace) -> None:
    from deepspeed_sdp.adapters import ADAPTERS

    rows = [
        {
            "adapter": adapter.name,
            "families": list(adapter.families),
            "attention": about["attention"],
            "mlp": about["mlp"],
        }
        for adapter in ADAPTERS
        for about in (adapter.units,)
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['adapter']:<10}{', '.join(row['families'])}")
        print(f"{'':<10}attention: {row['attention']}; mlp: {row['mlp']}; blocks: layers or branches")
    print("A family is known by the names of its modules, not by its class; docs/adapters.md shows how to add one.")


def _report(args: argparse.Namespace) -> None:
    from deepspeed_sdp.report import to_markdown

    data = read_json(args.folder / "report.json", "report")
    print(json.dumps(data, indent=2) if args.json else to_markdown(data))


def _listed(convert: type) -> Any:
    def parse(text: str) -> list[Any]:
        return [convert(part.strip()) for part in text.split(",")]

    parse.__name__ = f"list of {convert.__name__}"
    return parse


def _per_kind(convert: type) -> Any:
    def parse(text: str) -> Any:
        if "=" not in text:
            return convert(text)
        return {kind.strip(): convert(value) for kind, value in (part.split("=", 1) for part in text.split(","))}

    parse.__name__ = convert.__name__
    return parse


if __name__ == "__main__":
    sys.exit(main())
