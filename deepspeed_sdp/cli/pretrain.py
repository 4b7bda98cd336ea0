"""``pretrain``: a model from a recipe, started here or by a launcher; ``recipes``: those that come with the package."""

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.cli.options import written
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.options import check_values
from deepspeed_sdp.pretraining.options import add_job_options, add_run_options, check_job_options

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands
    from deepspeed_sdp.pretraining.recipe import Run

_DESCRIPTION = """Pretrain from a recipe, one file that says all of a run: model, data, length, method, DeepSpeed's
settings.

    deepspeed-sdp pretrain 134m --data data/fineweb-1B --output_dir runs/134m --sdp.coverage 1/4

Any value of the recipe can be changed, by the options below or as --deepspeed.KEY VALUE:
--length.tokens 1e8 --sdp.plan.design cyclic --deepspeed.optimizer.params.lr 1e-3. --sdp.enabled false trains the dense
baseline.

The ranks of this machine are started here. Where a launcher has started this already, it is one of the ranks:
deepspeed --module deepspeed_sdp.cli pretrain ..., torchrun -m deepspeed_sdp.cli pretrain ..., or srun.

With --elastic torchrun is the launcher, and a rank that is killed does not end the job."""


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
    schema = kinds.add_parser("schema", help="the JSON schema of a recipe, for editors")
    schema.set_defaults(run=_schema)
    copied = kinds.add_parser("copy", help="a recipe into a file, to be edited")
    copied.add_argument("recipe", metavar="RECIPE", help="its name")
    copied.add_argument("file", type=Path, metavar="FILE", help="where to")
    copied.set_defaults(run=_copy)


def _add_pretrain(commands: "Commands") -> None:
    parser = commands.add_parser(
        "pretrain",
        help="pretrain from a recipe",
        usage="deepspeed-sdp pretrain RECIPE --output_dir DIR [OPTION ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of one that comes with the package, or a file")
    add_job_options(parser)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks to start on this machine (default: one for each of its GPUs; on a CPU the recipe's subnetworks)",
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """``deepspeed-sdp pretrain``: start the ranks, or be one of them.

    Raises:
        ConfigError: what can be known before any rank is started.
    """
    if not (args.dry_run or "RANK" in os.environ):
        _start_ranks(args)
    from deepspeed_sdp.pretraining.run import run_job

    run_job(args, _read)


def _read(args: argparse.Namespace) -> "Run":
    from deepspeed_sdp.pretraining.recipe import read_recipe

    check_values(args, {"gpus": (args.gpus is None or args.gpus >= 1, "a number from 1 on")})
    return read_recipe(args.recipe, args.settings)


def _start_ranks(args: argparse.Namespace) -> None:
    """DeepSpeed's launcher takes the place of this process, and starts the same command on every rank.

    torchrun does for an elastic job: it starts ranks again.
    """
    from deepspeed_sdp.pretraining.console import quiet

    quiet(args.verbose)
    from deepspeed.accelerator import get_accelerator

    from deepspeed_sdp.engine import check_apart, zero_stage
    from deepspeed_sdp.pretraining.fitting import check_fits

    recipe = _read(args)
    check_job_options(args, recipe.data.source)
    accelerator = get_accelerator()
    on_cpu, devices = accelerator.device_name() == "cpu", accelerator.device_count()
    ranks = args.gpus or (recipe.sdp.num_subnetworks or 1 if on_cpu else devices)
    if ranks > devices and not on_cpu:
        raise ConfigError(f"--gpus: got {ranks}; takes up to the {devices} of this machine")
    # What can be known is said before any rank is started.
    recipe.micro_batches(ranks)
    if args.elastic is not None:
        check_fits(recipe)
    if recipe.sdp.enabled:
        workers = recipe.sdp.subnetworks(ranks)
        recipe.sdp.owners(workers)
        check_apart(zero_stage(recipe.ds_config), recipe.sdp, ranks // workers)
    if on_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # By its module: its script may lie in no folder of PATH.
    if args.elastic is None:
        port = os.environ.get("MASTER_PORT") or _free_port()
        launcher = ["deepspeed.launcher.runner", "--log_level", "error", "--num_accelerators", str(ranks)]
        launcher += ["--master_port", port, "--module"]
    else:
        # One restart for each rank but the last that may be lost.
        launcher = ["deepspeed_sdp.cli.elastic_launcher", "--standalone", "--nproc_per_node", str(ranks)]
        launcher += ["--max_restarts", str(ranks - 1), "-m"]
    sys.stdout.flush()
    # DeepSpeed looks for tools beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.execv(sys.executable, [sys.executable, "-m", *launcher, "deepspeed_sdp.cli", *args.command])


def _free_port() -> str:
    """Two jobs of one machine do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _list(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.recipe import read_recipe, recipe_names

    for name in recipe_names():
        recipe = read_recipe(name)
        sdp, length, ranks = recipe.sdp, recipe.length, recipe.sdp.num_subnetworks or 1
        how_long = f"{length.tokens:.3g} tokens" if length.steps is None else f"{length.steps} steps"
        print(
            f"{name:<6}{recipe.model.path}: {how_long} in sequences of {recipe.data.seq_length}, global batch "
            f"{recipe.global_batch(ranks)}; {sdp.masking} masking by {sdp.granularity}, "
            f"{sdp.num_subnetworks} subnetworks, coverage {sdp.coverage}"
        )


def _schema(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.schema import RunSchema

    print(json.dumps(RunSchema.model_json_schema(), indent=2))


def _show(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.recipe import recipe_path

    print(recipe_path(args.recipe).read_text(encoding="utf-8"), end="")


def _copy(args: argparse.Namespace) -> None:
    from deepspeed_sdp.pretraining.recipe import recipe_path

    source = recipe_path(args.recipe)
    if args.file.exists():
        raise ConfigError(f"FILE: {args.file} exists; takes a new one")
    written(args.file, lambda path: path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8"))
