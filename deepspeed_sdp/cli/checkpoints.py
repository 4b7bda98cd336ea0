"""``inspect`` and ``export``: what a checkpoint holds, and the model in it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
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
