"""The command line of launch/train.py. Imports nothing heavy, so that --help answers at once."""

import argparse
import math
import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.options import OptionParser, spelt

if TYPE_CHECKING:
    from deepspeed_sdp.data.source import SourceSpec

_STREAM_OPTIONS = (
    "tokenizer", "stream_config", "stream_revision", "stream_heldout_fraction", "text_column", "on_broken_row",
    "on_broken_file", "retries", "num_lanes",
)  # fmt: skip


class _Parser(OptionParser):
    """Rank 0 speaks for all ranks, which are given the same command line."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", "0")):
            time.sleep(2.0)  # the launcher ends rank 0 when this one ends
            sys.exit(2)
        super().error(message)


def parse_arguments(argv: list[str], description: str | None) -> argparse.Namespace:
    is_job = not _is_dry_run(argv)
    parser = _Parser(
        prog="launch/train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    job = parser.add_argument_group("job")
    job.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="JSON",
        help="DeepSpeed config: batch, optimizer, ZeRO stage, schedule",
    )
    job.add_argument(
        "--sdp_config",
        metavar="JSON",
        help='the SDP block; default: "subnetwork_data_parallel" in the DeepSpeed config',
    )
    job.add_argument(
        "--model_config",
        required=True,
        metavar="PATH",
        help="HuggingFace config.json, or a folder with one; its vocab_size follows the tokenizer",
    )
    job.add_argument(
        "--output_dir", required=is_job, metavar="DIR", help="gets hf/, report.json, report.md, loss.png, plan.png"
    )
    job.add_argument(
        "--seed",
        type=int,
        default=0,
        help="order of the training sequences (default: 0); initial weights follow the SDP block's seed",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help=".txt, .jsonl or .parquet files or folders with a 'text' column; default: Python's own documentation",
    )
    text.add_argument(
        "--max_text_mb", type=float, default=8.0, help="size of the built-in text in MB, at most (default: 8)"
    )
    text.add_argument(
        "--heldout_fraction",
        type=float,
        default=0.05,
        help="share of the documents held out for validation (default: 0.05)",
    )
    text.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder of a HuggingFace tokenizer; default: a sentencepiece tokenizer is trained on the text",
    )
    text.add_argument("--vocab_size", type=int, default=4096, help="size of the trained tokenizer (default: 4096)")
    text.add_argument("--seq_length", type=int, default=256, help="tokens of one training sequence (default: 256)")
    text.add_argument(
        "--data_cache", metavar="DIR", help="prepared text; default: OUTPUT_DIR/data. Must be visible to all nodes"
    )
    run = parser.add_argument_group("length and evaluation")
    length = run.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--tokens", type=float, help="training tokens over all ranks, e.g. 1e9")
    run.add_argument(
        "--eval_interval", type=int, default=50, help="steps between evaluations of the full model (default: 50)"
    )
    run.add_argument(
        "--eval_sequences",
        type=int,
        default=128,
        help="held-out sequences of an evaluation in mid-run, 0: all (default: 128); the last one takes all",
    )
    run.add_argument(
        "--compare_dense",
        action="store_true",
        help="at the end, measure the dense model's state under the same DeepSpeed config; needs the memory for it",
    )
    saving = parser.add_argument_group("checkpoints, in OUTPUT_DIR/checkpoints")
    saving.add_argument(
        "--checkpoint_interval",
        type=int,
        default=0,
        help="steps between checkpoints (default: 0, only when SIGTERM or SIGUSR1 asks the job to stop)",
    )
    saving.add_argument(
        "--restart", action="store_true", help="begin anew; without it a job goes on from its latest checkpoint"
    )
    other = parser.add_argument_group("other")
    _add_dry_run(other)
    other.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log")
    other.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    if int(os.environ.get("RANK", "0")) and set(argv) & {"-h", "--help"}:
        sys.exit(0)
    return parser.parse_args(argv)


def _is_dry_run(argv: list[str]) -> bool:
    return "--dry_run" in spelt(argv)


def _add_dry_run(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--dry_run", action="store_true", help="say what would be done, and end; one process does, without a launcher"
    )
    group.add_argument(
        "--world_size",
        type=int,
        metavar="N",
        help="of --dry_run: on so many ranks (default: those launched, or the SDP block's num_subnetworks)",
    )


def dry_world_size(args: argparse.Namespace, num_subnetworks: int | None) -> int:
    """Ranks of a job that is only described."""
    return args.world_size or int(os.environ.get("WORLD_SIZE", "0")) or num_subnetworks or 1


def parse_pretrain_arguments(argv: list[str], description: str | None) -> argparse.Namespace:
    is_job = not _is_dry_run(argv)
    parser = _Parser(
        prog="launch/pretrain.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", required=True, metavar="JSON", help='DeepSpeed config with a block "pretraining", as in ds_configs/'
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe, e.g. pretraining.tokens=1e8; can be given many times",
    )
    text = parser.add_mutually_exclusive_group(required=is_job)
    text.add_argument("--data", metavar="DIR", help="folder that deepspeed-sdp data made; visible to all nodes")
    text.add_argument(
        "--stream",
        nargs="+",
        metavar="PATH",
        help="tokenise on the fly instead: hub:OWNER/NAME, or .parquet and .jsonl files (.gz, .zst) or their folders",
    )
    parser.add_argument("--stream_config", metavar="NAME", help="of the hub data set, e.g. sample-10BT")
    parser.add_argument("--stream_revision", metavar="COMMIT", help="of the hub data set; best a commit")
    parser.add_argument(
        "--stream_heldout_fraction",
        type=float,
        help="share of the documents that --stream holds out for validation (default: 0.005)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="HuggingFace tokenizer for --stream, a folder or hub name")
    parser.add_argument("--text_column", metavar="NAME", help="of --stream (default: text)")
    skip = ("skip", "stop")
    parser.add_argument("--on_broken_row", choices=skip, help="of --stream (default: skip, and count)")
    parser.add_argument("--on_broken_file", choices=skip, help="of --stream (default: stop)")
    parser.add_argument("--retries", type=int, metavar="N", help="of a connection that --stream loses (default: 8)")
    parser.add_argument(
        "--num_lanes",
        type=int,
        metavar="N",
        help="parts in which --stream is read: a multiple of the ranks that divides the global batch; fewer for a "
        "small source (default: the most up to 64; a run goes on with those it began with)",
    )
    parser.add_argument(
        "--output_dir",
        required=is_job,
        metavar="DIR",
        help="gets hf/, checkpoints/, metrics.jsonl, report.md, loss.png",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of those that follow from the recipe")
    _add_dry_run(parser)
    parser.add_argument(
        "--restart", action="store_true", help="begin anew; without it a job goes on from its latest checkpoint"
    )
    parser.add_argument(
        "--stop_file",
        metavar="FILE",
        help="written when the job saved because it was asked to stop, for its scheduler",
    )
    parser.add_argument(
        "--peak_tflops",
        type=float,
        help="matmul TFLOPS of the device, for the MFU; default: by the device's name",
    )
    parser.add_argument("--tensorboard", action="store_true", help="figures to OUTPUT_DIR/tensorboard too")
    parser.add_argument("--wandb", metavar="PROJECT", help="figures to Weights & Biases too")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    if int(os.environ.get("RANK", "0")) and set(argv) & {"-h", "--help"}:
        sys.exit(0)
    return parser.parse_args(argv)


def heldout_fraction(args: argparse.Namespace) -> float:
    """Of a stream."""
    return 0.005 if args.stream_heldout_fraction is None else float(args.stream_heldout_fraction)


def stream_source(args: argparse.Namespace) -> "SourceSpec":
    """What ``--stream`` and the options beside it say."""
    from deepspeed_sdp.data.faults import FaultPolicy
    from deepspeed_sdp.data.source import SourceSpec

    names = ("on_broken_row", "on_broken_file", "retries")
    policy = FaultPolicy(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    column = {} if args.text_column is None else {"text_column": args.text_column}
    return SourceSpec(
        tuple(args.stream), args.stream_config, args.stream_revision, faults=policy, option="--stream", **column
    )


def check_pretrain_arguments(args: argparse.Namespace) -> None:
    if args.stream and not args.tokenizer:
        raise ConfigError("--tokenizer: got none with --stream; takes a HuggingFace tokenizer, a folder or hub name")
    given = [name for name in _STREAM_OPTIONS if getattr(args, name) is not None]
    if not args.stream and given:
        without = "with --data" if args.data else "without --stream"
        raise ConfigError(f"--{given[0]}: got {getattr(args, given[0])} {without}; takes it with --stream alone")
    takes = {
        "steps": (args.steps is None or args.steps >= 1, "a number from 1 on"),
        "stream_heldout_fraction": (0 < heldout_fraction(args) < 1, "a number between 0 and 1"),
        "retries": (args.retries is None or args.retries >= 0, "a number from 0 on"),
        "num_lanes": (args.num_lanes is None or args.num_lanes >= 1, "a number from 1 on"),
        **_dry_run_takes(args),
        "peak_tflops": (args.peak_tflops is None or 0 < args.peak_tflops < math.inf, "a positive number"),
    }
    _check(args, takes)


def check_arguments(args: argparse.Namespace) -> None:
    takes = {
        "steps": (args.steps is None or args.steps >= 1, "a number from 1 on"),
        "tokens": (args.tokens is None or 1 <= args.tokens < math.inf, "a number from 1 on"),
        "seed": (args.seed >= 0, "a number from 0 on"),
        "seq_length": (args.seq_length >= 2, "a number from 2 on"),
        "eval_interval": (args.eval_interval >= 1, "a number from 1 on"),
        "checkpoint_interval": (args.checkpoint_interval >= 0, "a number from 0 on"),
        "eval_sequences": (args.eval_sequences >= 0, "a number from 0 on"),
        "heldout_fraction": (0 < args.heldout_fraction < 1, "a number between 0 and 1"),
        "max_text_mb": (0 < args.max_text_mb < math.inf, "a positive number"),
        **_dry_run_takes(args),
    }
    _check(args, takes)


def _dry_run_takes(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    is_fine = args.world_size is None or (args.dry_run and args.world_size >= 1)
    return {"world_size": (is_fine, "a number from 1 on, with --dry_run; a job has the ranks that were launched")}


def _check(args: argparse.Namespace, takes: dict[str, tuple[bool, str]]) -> None:
    for name, (fine, what) in takes.items():
        if not fine:
            raise ConfigError(f"--{name}: got {getattr(args, name)}; takes {what}")
