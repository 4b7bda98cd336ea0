"""Pretrain from a recipe, one file that says all of a run: model, text, length, SDP or dense, DeepSpeed's settings.

    deepspeed --num_accelerators 8 launch/pretrain.py \\
        --recipe ds_configs/fineweb/134m/forward-neuron-1_2.json --data data/fineweb-1B --output_dir runs/134m
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from arguments import check_pretrain_arguments, heldout_fraction, parse_pretrain_arguments, stream_source

from deepspeed_sdp.failures import on_first_rank, one_report
from deepspeed_sdp.stopping import StopRequest


def main(argv: list[str]) -> None:
    args = parse_pretrain_arguments(argv, __doc__)
    stop = StopRequest()
    with one_report():
        check_pretrain_arguments(args)
        pretrain(args, stop)


def pretrain(args: argparse.Namespace, stop: StopRequest) -> None:
    from deepspeed_sdp.pretraining.console import quiet, say

    quiet(args.verbose)
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from deepspeed_sdp.engine import agreed, check_job, start_communication
    from deepspeed_sdp.pretraining.job import build_engine, describe, loop_settings, make_job
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
    recipe = agreed(lambda: read_recipe(args.recipe, args.set), lambda found: found.describe(vars(args)))
    recipe.micro_batches(world_size)
    add_monitors(recipe.ds_config, output, args.tensorboard, args.wandb)
    agreed(lambda: check_monitors(recipe.ds_config))
    # Before the text is opened, which can take longer.
    check_job(lambda: meta_model(read_model_config(recipe.model_file, "pretraining.model")), config=recipe.for_steps(1))
    on_first_rank(lambda: make_writable(output))
    if args.data:
        text: Text = agreed(lambda: open_text(Path(args.data), recipe), lambda found: found.state_dict())
    else:
        fraction = heldout_fraction(args)
        text = StreamedText(stream_source(args), args.tokenizer, recipe, output, fraction, args.num_lanes)
    job = agreed(lambda: make_job(recipe, world_size, text.tokenizer_folder, args.steps))
    about = describe(job)
    say(about)
    if args.dry_run:
        leave()
        return
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


if __name__ == "__main__":
    main(sys.argv[1:])
