"""A job: what every rank does from a run's settings to the report, or says that it would do."""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_sdp.failures import one_report
from deepspeed_sdp.options import dry_world_size
from deepspeed_sdp.pretraining.options import check_job_options
from deepspeed_sdp.stopping import StopRequest

if TYPE_CHECKING:
    from deepspeed_sdp.pretraining.recipe import Run

# What the parser keeps besides, what is compared as it was read, and what may differ between ranks.
_NOT_COMPARED = (
    "run", "command", "settings", "recipe", "deepspeed_config", "sdp_config", "local_rank", "gpus", "elastic_folder",
)  # fmt: skip


def run_job(args: argparse.Namespace, read: Callable[[argparse.Namespace], "Run"]) -> None:
    """Collective, or of one process for a dry run. Ends this process with one message of all ranks where it fails.

    Args:
        args: a job's options, and what ``read`` takes.
        read: makes the run.
    """
    with closing(StopRequest()) as stop, one_report():
        if not args.dry_run:
            pretrain(args, read, stop)
        elif int(os.environ.get("RANK", "0")) == 0:
            dry_run(args, read)


def pretrain(args: argparse.Namespace, read: Callable[[argparse.Namespace], "Run"], stop: StopRequest) -> None:
    """Collective. Train to the end, or until ``stop`` is asked for.

    Raises:
        SDPError: on all ranks alike.
    """
    from deepspeed_sdp.pretraining.console import quiet, say

    quiet(args.verbose)
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from deepspeed_sdp.agreement import agreed, from_first_rank
    from deepspeed_sdp.engine import check_job, start_communication
    from deepspeed_sdp.pretraining.dense import add_dense_state
    from deepspeed_sdp.pretraining.elastic import Elastic
    from deepspeed_sdp.pretraining.fitting import fitted
    from deepspeed_sdp.pretraining.job import build_engine, describe, loop_settings, make_job, make_plan_of
    from deepspeed_sdp.pretraining.loop import Loop, Outcome, conclude, leave, make_writable
    from deepspeed_sdp.pretraining.monitors import add_monitors, check_monitors
    from deepspeed_sdp.pretraining.sources import open_text
    from deepspeed_sdp.report import RunReport
    from deepspeed_sdp.subnetwork import meta_model, read_model_config

    elastic: Elastic | None = None

    def settled() -> "Run":
        run = read(args)
        check_job_options(args, run.data.source)
        if elastic is not None and elastic.first is not None:
            run = fitted(run, elastic.first, dist.get_world_size())
        run.micro_batches(dist.get_world_size())
        return run

    if args.elastic is not None:
        elastic = Elastic(args, read)
        if not elastic.members.is_member:
            elastic.members.wait_until_over()
            return

    # The launcher's option, or what torchrun and the Slurm template set.
    local_rank = args.local_rank if args.local_rank >= 0 else int(os.environ.get("LOCAL_RANK", "-1"))
    if local_rank >= 0:
        get_accelerator().set_device(local_rank)
    start_communication()
    # All ranks fail alike, or find the same: a node may see another recipe, or no data.
    options = {key: value for key, value in vars(args).items() if key not in _NOT_COMPARED}
    run = agreed(settled, lambda found: {**found.describe(), "option": options})
    world_size, output = dist.get_world_size(), Path(args.output_dir)
    kept = elastic.begin() if elastic is not None and not elastic.is_new else None
    add_monitors(run.ds_config, output, run.logging.tensorboard, run.logging.wandb)
    agreed(lambda: check_monitors(run.ds_config))
    # Before the text is opened, which can take longer.
    check_job(lambda: meta_model(read_model_config(run.model_file, "model.path")), config=run.for_steps(1))
    from_first_rank(lambda: make_writable(output))
    text = open_text(run, output)
    plan = from_first_rank(lambda: make_plan_of(run, world_size, text.tokenizer_folder, dist.get_backend()))
    job = agreed(lambda: make_job(run, world_size, text.tokenizer_folder, plan))
    about = describe(job)
    if elastic is not None and elastic.members.left_out:
        about["left out"] = (
            f"{elastic.members.left_out} of the ranks that torchrun started: they were lost, or are too many"
        )
    say(about)
    engine = build_engine(job)
    report = RunReport(facts=job.facts, unigram_val_loss=text.unigram_val_loss, run=about)
    settings = loop_settings(job, output)
    if elastic is None or elastic.is_new:
        settings = dataclasses.replace(settings, restart=args.restart)
    loop = Loop(engine, text, report, settings, stop)
    loop.claim()
    if elastic is not None:
        loop.kept = kept or elastic.begin(world_size, job.length.steps)
    outcome = loop.run()
    if outcome is Outcome.FINISHED:
        conclude(loop)
        if run.logging.compare_dense and run.sdp.enabled:
            del engine
            add_dense_state(loop, job)
    if dist.get_rank() == 0:
        if outcome is Outcome.FINISHED:
            print(report.closing_lines(output), flush=True)
        elif outcome is Outcome.WAS_FINISHED:
            print(f"finished before: {output / 'report.md'}; --restart begins anew", flush=True)
        elif args.stop_file:
            Path(args.stop_file).write_text("", encoding="utf-8")
    if elastic is not None:
        elastic.end(outcome is not Outcome.STOPPED)
    leave()


def dry_run(args: argparse.Namespace, read: Callable[[argparse.Namespace], "Run"]) -> None:
    """Say what a job would do, in one process and for any number of ranks."""
    from deepspeed_sdp.pretraining.console import in_lines, quiet

    quiet(args.verbose)
    from deepspeed_sdp.pretraining.job import check, describe, make_job
    from deepspeed_sdp.pretraining.sources import find_tokenizer_folder

    run = read(args)
    check_job_options(args, run.data.source)
    world_size = dry_world_size(args, run.sdp.num_subnetworks)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(run, world_size, find_tokenizer_folder(run, Path(folder)))
    if run.sdp.enabled:
        check(run.for_steps(1), run.sdp, job.model, job.plan)
    print(in_lines(describe(job)), flush=True)
