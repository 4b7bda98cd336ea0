"""Pretrain a causal language model with Subnetwork Data Parallelism, from raw text to a HuggingFace folder.

    deepspeed --num_accelerators 4 launch/train.py \\
        --deepspeed_config ds_configs/demo.json --sdp_config ds_configs/demo_sdp.json \\
        --model llama-demo --text my.jsonl --steps 300 --output_dir runs/mine

What "deepspeed-sdp pretrain" reads from a recipe stands in two files here, and in options.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.options import OptionParser
from deepspeed_sdp.pretraining.options import add_job_options, add_run_options, parse_run
from deepspeed_sdp.pretraining.run import run_job

if TYPE_CHECKING:
    from deepspeed_sdp.pretraining.recipe import Run


def main(argv: list[str]) -> None:
    run_job(parse_run(make_parser(), argv), read)


def make_parser() -> OptionParser:
    parser = OptionParser(
        prog="launch/train.py",
        usage="launch/train.py --deepspeed_config JSON --model CONFIG --output_dir DIR [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="JSON",
        help="DeepSpeed config: batch, optimizer, ZeRO stage, schedule",
    )
    files.add_argument(
        "--sdp_config",
        metavar="JSON",
        help='the SDP block; default: "subnetwork_data_parallel" in the DeepSpeed config',
    )
    add_job_options(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    add_run_options(parser)
    return parser


def read(args: argparse.Namespace) -> "Run":
    from deepspeed_sdp.pretraining.recipe import run_of_files

    return run_of_files(args.deepspeed_config, args.sdp_config, args.settings, Path(sys.argv[0]).name)


if __name__ == "__main__":
    main(sys.argv[1:])
