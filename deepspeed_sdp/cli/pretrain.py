"""``pretrain``: a model from a recipe, started here or by a launcher; ``recipes``: those that come with the package."""

import argparse
import math
import os
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.cli.options import written
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.failures import one_report
from deepspeed_sdp.options import add_dry_run, check_values
from deepspeed_sdp.stopping import StopRequest

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands

_STREAM_OPTIONS = (
    "tokenizer", "stream_config", "stream_revision", "stream_heldout_fraction", "text_column", "on_broken_row",
    "on_broken_file", "retries", "num_lanes",
)  # fmt: skip
_DESCRIPTION = """Pretrain from a recipe, one file that says all of a run: model, length, method, DeepSpeed's settings.

    deepspeed-sdp pretrain 134m --data data/fineweb-1B --output_dir runs/134m --sdp.coverage 1/4

Any value of the recipe can be changed by --SECTION.KEY VALUE, where a section is pretraining, sdp (the SDP block) or
deepspeed (everything else): --pretraining.tokens 1e8 --sdp.plan.design cyclic --deepspeed.optimizer.params.lr 1e-3.
--sdp.enabled false trains the dense baseline.

The ranks of this machine are started here. Where a launcher has started this already, it is one of the ranks:
deepspeed --module deepspeed_sdp.cli pretrain ..., torchrun -m deepspeed_sdp.cli pretrain ..., or srun."""


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
    _add_pretrain(commands)
    recipes = commands.add_parser("recipes", help="the recipes that come with the package")
    kinds = recipes.add_subparsers(required=True, metavar="ACTION")
    listed = kinds.add_parser("list", help="names, models and lengths")
    listed.set_defaults(run=_list)
    shown = kinds.add_parser("show", help="a recipe as it stands")
    shown.add_argument("recipe", metavar="RECIPE", help="its name")
    shown.set_defaults(run=_show)
    copied = kinds.add_parser("copy", help="a recipe into a file, to be edited")
    copied.add_argument("recipe", metavar="RECIPE", help="its name")
    copied.add_argument("file", type=Path, metavar="FILE", help="where to")
    copied.set_defaults(run=_copy)


def _add_pretrain(commands: "Commands") -> None:
    parser = commands.add_parser(
        "pretrain",
        help="pretrain from a recipe",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of one that comes with the package, or a file")
    text = parser.add_mutually_exclusive_group()
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
        "--output_dir", metavar="DIR", help="gets hf/, checkpoints/, metrics.jsonl, report.md, loss.png"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks to start on this machine (default: one for each of its GPUs; on a CPU the recipe's subnetworks)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of those that follow from the recipe")
    add_dry_run(parser)
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
    parser.set_defaults(run=_pretrain, takes_settings=True)


def _pretrain(args: argparse.Namespace) -> None:
    is_rank = "RANK" in os.environ
    if not (args.dry_run or is_rank):
        check(args)
        _start_ranks(args)
    with closing(StopRequest()) as stop, one_report():
        check(args)
        from deepspeed_sdp.pretraining.run import dry_run, pretrain

        if not args.dry_run:
            pretrain(args, stop)
        elif int(os.environ.get("RANK", "0")) == 0:
            dry_run(args)


def _start_ranks(args: argparse.Namespace) -> None:
    """DeepSpeed's launcher takes the place of this process, and starts the same command on every rank."""
    from deepspeed_sdp.pretraining.console import quiet

    quiet(args.verbose)
    from deepspeed.accelerator import get_accelerator

    from deepspeed_sdp.pretraining.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.settings)
    accelerator = get_accelerator()
    on_cpu, devices = accelerator.device_name() == "cpu", accelerator.device_count()
    ranks = args.gpus or (recipe.sdp.num_subnetworks or 1 if on_cpu else devices)
    if ranks > devices and not on_cpu:
        raise ConfigError(f"--gpus: got {ranks}; takes up to the {devices} of this machine")
    # What can be known is said before any rank is started.
    recipe.micro_batches(ranks)
    if recipe.sdp.enabled:
        recipe.sdp.owners(recipe.sdp.subnetworks(ranks))
    if on_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    port = os.environ.get("MASTER_PORT") or _free_port()
    launcher = ["deepspeed", "--log_level", "error", "--num_accelerators", str(ranks), "--master_port", port]
    sys.stdout.flush()
    # DeepSpeed looks for tools beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.execvp("deepspeed", [*launcher, "--module", "deepspeed_sdp.cli", *args.command])


def _free_port() -> str:
    """Two jobs of one machine do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def check(args: argparse.Namespace) -> None:
    """Whether the options fit each other.

    Raises:
        ConfigError: names the option.
    """
    if not args.dry_run and not (args.data or args.stream):
        raise ConfigError("--data or --stream: got none; takes one, or --dry_run")
    if not args.dry_run and not args.output_dir:
        raise ConfigError("--output_dir: got none; takes one, or --dry_run")
    if args.stream and not args.tokenizer:
        raise ConfigError("--tokenizer: got none with --stream; takes a HuggingFace tokenizer, a folder or hub name")
    given = [name for name in _STREAM_OPTIONS if getattr(args, name) is not None]
    if not args.stream and given:
        without = "with --data" if args.data else "without --stream"
        raise ConfigError(f"--{given[0]}: got {getattr(args, given[0])} {without}; takes it with --stream alone")
    fraction = args.stream_heldout_fraction
    takes = {
        "steps": (args.steps is None or args.steps >= 1, "a number from 1 on"),
        "gpus": (args.gpus is None or args.gpus >= 1, "a number from 1 on"),
        "stream_heldout_fraction": (fraction is None or 0 < fraction < 1, "a number between 0 and 1"),
        "retries": (args.retries is None or args.retries >= 0, "a number from 0 on"),
        "num_lanes": (args.num_lanes is None or args.num_lanes >= 1, "a number from 1 on"),
        "peak_tflops": (args.peak_tflops is None or 0 < args.peak_tflops < math.inf, "a positive number"),
    }
    check_values(args, takes)


def _list(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.recipe import read_recipe, recipe_names

    for name in recipe_names():
        recipe = read_recipe(name)
        about, sdp = recipe.about, recipe.sdp
        print(
            f"{name:<6}{about.model}: {about.tokens:.3g} tokens in sequences of {about.seq_length}, global batch "
            f"{recipe.ds_config['train_batch_size']}; {sdp.masking} masking by {sdp.granularity}, "
            f"{sdp.num_subnetworks} subnetworks, coverage {sdp.coverage}"
        )


def _show(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.recipe import recipe_path

    print(recipe_path(args.recipe).read_text(encoding="utf-8"), end="")


def _copy(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.recipe import recipe_path

    source = recipe_path(args.recipe)
    if args.file.exists():
        raise ConfigError(f"FILE: {args.file} exists; takes a new one")
    written(args.file, lambda path: path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8"))
