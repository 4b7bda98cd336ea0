"""A job from a recipe: what every rank does from the recipe to the report, or says that it would do."""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.options import dry_world_size
from deepspeed_sdp.stopping import StopRequest

if TYPE_CHECKING:
    from deepspeed_sdp.data.source import SourceSpec
    from deepspeed_sdp.pretraining.recipe import Recipe


# What the command line's parser keeps besides options, and what may differ.
_OF_A_RANK = ("run", "takes_settings", "command", "local_rank", "gpus")


def pretrain(args: argparse.Namespace, stop: StopRequest) -> None:
    """Collective. Train to the end, or until ``stop`` is asked for.

    Args:
        args: of ``deepspeed-sdp pretrain``.

    Raises:
        SDPError: on all ranks alike.
    """
    from deepspeed_sdp.pretraining.console import quiet, say

    quiet(args.verbose)
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from deepspeed_sdp.agreement import agreed, from_first_rank
    from deepspeed_sdp.engine import check_job, start_communication
    from deepspeed_sdp.pretraining.job import build_engine, describe, loop_settings, make_job, make_plan_of
    from deepspeed_sdp.pretraining.loop import Loop, Outcome, conclude, leave, make_writable
    from deepspeed_sdp.pretraining.monitors import add_monitors, check_monitors
    from deepspeed_sdp.pretraining.recipe import read_recipe
    from deepspeed_sdp.pretraining.sources import open_text
    from deepspeed_sdp.pretraining.streamed_text import StreamedText
    from deepspeed_sdp.pretraining.text import Text
    from deepspeed_sdp.report import RunReport
    from deepspeed_sdp.subnetwork import meta_model, read_model_config

    # The launcher's option, or what torchrun and the Slurm template set.
    local_rank = args.local_rank if args.local_rank >= 0 else int(os.environ.get("LOCAL_RANK", "-1"))
    if local_rank >= 0:
        get_accelerator().set_device(local_rank)
    start_communication()
    world_size, output = dist.get_world_size(), Path(args.output_dir)
    # All ranks fail alike, or find the same: a node may see another recipe, or no data.
    options = {key: value for key, value in vars(args).items() if key not in _OF_A_RANK}
    recipe = agreed(lambda: read_recipe(args.recipe, args.settings), lambda found: found.describe(options))
    recipe.micro_batches(world_size)
    add_monitors(recipe.ds_config, output, args.tensorboard, args.wandb)
    agreed(lambda: check_monitors(recipe.ds_config))
    # Before the text is opened, which can take longer.
    check_job(lambda: meta_model(read_model_config(recipe.model_file, "pretraining.model")), config=recipe.for_steps(1))
    from_first_rank(lambda: make_writable(output))
    if args.data:
        text: Text = agreed(lambda: open_text(Path(args.data), recipe), lambda found: found.state_dict())
    else:
        fraction = args.stream_heldout_fraction
        text = StreamedText(stream_source(args), args.tokenizer, recipe, output, fraction or 0.005, args.num_lanes)
    plan = from_first_rank(lambda: make_plan_of(recipe, world_size, text.tokenizer_folder, dist.get_backend()))
    job = agreed(lambda: make_job(recipe, world_size, text.tokenizer_folder, args.steps, plan))
    about = describe(job)
    say(about)
    engine = build_engine(job)
    report = RunReport(
        facts=job.facts,
        unigram_val_loss=text.unigram_val_loss,
        run=about,
    )
    settings = loop_settings(job, output, args.peak_tflops and args.peak_tflops * 1e12)
    loop = Loop(engine, text, report, dataclasses.replace(settings, restart=args.restart), stop)
    outcome = loop.run()
    if outcome is Outcome.FINISHED:
        conclude(loop)
    if dist.get_rank() == 0:
        if outcome is Outcome.FINISHED:
            print(report.closing_lines(output), flush=True)
        elif outcome is Outcome.WAS_FINISHED:
            print(f"finished before: {output / 'report.md'}; --restart begins anew", flush=True)
        elif args.stop_file:
            Path(args.stop_file).write_text("", encoding="utf-8")
    leave()


def dry_run(args: argparse.Namespace) -> None:
    """Say what a job would do, in one process and for any number of ranks."""
    from deepspeed_sdp.pretraining.console import in_lines, quiet

    quiet(args.verbose)
    from deepspeed_sdp.pretraining.job import check, describe, make_job
    from deepspeed_sdp.pretraining.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.settings)
    world_size = dry_world_size(args, recipe.sdp.num_subnetworks)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(recipe, world_size, tokenizer_folder(args, recipe, Path(folder)), args.steps)
    if recipe.sdp.enabled:
        check(recipe.for_steps(1), recipe.sdp, job.model, job.plan)
    print(in_lines(describe(job)), flush=True)


def tokenizer_folder(args: argparse.Namespace, recipe: "Recipe", folder: Path) -> Path | None:
    """Of the text; a stream's is put into ``folder``. Without a text the model's vocabulary counts."""
    from deepspeed_sdp.data.tokenizer import find_tokenizer
    from deepspeed_sdp.pretraining.sources import open_text

    if args.data:
        return open_text(Path(args.data), recipe).tokenizer_folder
    if args.stream:
        find_tokenizer(args.tokenizer).save_pretrained(folder)
        return folder
    return None


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
