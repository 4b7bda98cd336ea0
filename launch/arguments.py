"""The command line of launch/train.py. Imports nothing heavy, so that --help answers at once."""

import argparse
import math

from deepspeed_sdp.options import OptionParser, add_dry_run, check_values, spelt


def parse_arguments(argv: list[str], description: str | None) -> argparse.Namespace:
    is_job = not _is_dry_run(argv)
    parser = OptionParser(
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
    add_dry_run(other)
    other.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log")
    other.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args(argv)


def _is_dry_run(argv: list[str]) -> bool:
    return "--dry_run" in spelt(argv)


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
    }
    check_values(args, takes)
