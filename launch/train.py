"""Pretrain a causal language model with Subnetwork Data Parallelism, from raw text to a HuggingFace folder.

    deepspeed --num_accelerators 4 launch/train.py \\
        --deepspeed_config ds_configs/demo.json --sdp_config ds_configs/demo_sdp.json \\
        --model_config ds_configs/demo_model.json --steps 300 --output_dir runs/demo
"""

import argparse
import dataclasses
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import check_arguments, parse_arguments

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.failures import one_report
from deepspeed_sdp.options import dry_world_size
from deepspeed_sdp.stopping import StopRequest

if TYPE_CHECKING:
    from deepspeed_sdp.data import Corpus


def main(argv: list[str]) -> None:
    args = parse_arguments(argv, __doc__)
    with closing(StopRequest()) as stop, one_report():
        check_arguments(args)
        if not args.dry_run:
            train(args, stop)
        elif int(os.environ.get("RANK", "0")) == 0:
            dry_run(args)


def train(args: argparse.Namespace, stop: StopRequest) -> None:
    from deepspeed_sdp.pretraining.console import quiet, say

    quiet(args.verbose)
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    import deepspeed_sdp
    from deepspeed_sdp.agreement import from_first_rank
    from deepspeed_sdp.data import load_corpus
    from deepspeed_sdp.engine import check_job, reduce_bucket_numel, start_communication
    from deepspeed_sdp.estimate.flops import flops_per_token
    from deepspeed_sdp.pretraining.job import make_facts
    from deepspeed_sdp.pretraining.loop import Loop, LoopSettings, Outcome, conclude, leave, make_writable
    from deepspeed_sdp.pretraining.text import PackedText
    from deepspeed_sdp.report import RunReport
    from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config

    # The launcher's option, or what torchrun and the Slurm template set.
    local_rank = args.local_rank if args.local_rank >= 0 else int(os.environ.get("LOCAL_RANK", "-1"))
    if local_rank >= 0:
        get_accelerator().set_device(local_rank)
    start_communication()
    output = Path(args.output_dir)
    cache = Path(args.data_cache) if args.data_cache else output / "data"
    from_first_rank(lambda: make_writable(output))
    # Before the text is prepared, which takes longer.
    sdp = check_job(lambda: meta_model(read_model_config(args.model_config)), args)
    if not sdp.enabled:
        raise ConfigError(
            "subnetwork_data_parallel.enabled: got false; takes true here (coverage 1 trains the dense model)"
        )
    from_first_rank(lambda: prepare_text(args, cache))
    corpus = load_corpus(cache)
    # On the meta device: only the subnetwork is ever given memory.
    model = meta_model(full_config(args, corpus))
    sdp = sdp.at_length(args.seq_length)
    plan = from_first_rank(lambda: plan_for(model, sdp, dist.get_world_size(), dist.get_backend()))
    flops = flops_per_token(model, args.seq_length, sdp, plan)
    config = dense_config(args)
    facts = make_facts(model, sdp, plan, flops)
    about = facts.describe()
    say(about)
    engine, *_ = deepspeed_sdp.initialize(args=args, config=config, model=model, sdp_config=sdp)
    facts = dataclasses.replace(facts, tokens_per_step=engine.train_batch_size() * args.seq_length)
    report = RunReport(facts=facts, unigram_val_loss=corpus.unigram_val_loss, run=about)
    settings = LoopSettings(
        output=output,
        steps=args.steps or max(1, round(args.tokens / facts.tokens_per_step)),
        eval_interval=args.eval_interval,
        checkpoint_interval=args.checkpoint_interval,
        eval_sequences=args.eval_sequences,
        calibration_sequences=sdp.calibration_sequences,
        restart=args.restart,
    )
    loop = Loop(engine, PackedText.of(corpus, args.seed), report, settings, stop)
    outcome = loop.run()
    if outcome is not Outcome.FINISHED:
        if outcome is Outcome.WAS_FINISHED and dist.get_rank() == 0:
            print(f"finished before: {output / 'report.md'}; --restart begins anew", flush=True)
        leave()
        return
    conclude(loop)
    if args.compare_dense:
        report.reduce_bucket_numel = reduce_bucket_numel(engine)
        engine.destroy()
        # All that refers to the subnetwork's memory; the dense model may need it.
        del engine, model, loop.engine
        report.dense_state_bytes = measure_dense(args, corpus, report.reduce_bucket_numel)
        from_first_rank(lambda: report.write(output))
    if dist.get_rank() == 0:
        print(report.closing_lines(output), flush=True)
    leave()


def dry_run(args: argparse.Namespace) -> None:
    """Say what a job would do, in one process and for any number of ranks."""
    from deepspeed_sdp.pretraining.console import in_lines, quiet

    quiet(args.verbose)
    from deepspeed_sdp.config import read_json, split_block
    from deepspeed_sdp.estimate import Job, flops_per_token
    from deepspeed_sdp.estimate.job_file import job_of
    from deepspeed_sdp.pretraining.job import check, make_facts, model_config
    from deepspeed_sdp.subnetwork import meta_model, plan_for

    ds_config = read_json(args.deepspeed_config, "--deepspeed_config")
    sdp = split_block(ds_config, args.sdp_config)
    config = model_config(Path(args.model_config), args.seq_length, Path(args.tokenizer) if args.tokenizer else None)
    if not args.tokenizer:
        config.vocab_size = args.vocab_size
    model = meta_model(config)
    world_size = dry_world_size(args, sdp.num_subnetworks)
    plan = plan_for(model, sdp, world_size)
    check(ds_config, sdp, model, plan)
    shape = job_of(ds_config, Job(world_size, seq_length=args.seq_length))
    each = shape.tokens * world_size
    steps = args.steps or max(1, round(args.tokens / each))
    about = make_facts(model, sdp, plan, flops_per_token(model, args.seq_length, sdp, plan)).describe()
    rows = {
        "model": f"{about['model']}, a vocabulary of {config.vocab_size}",
        "method": about["method"],
        "ranks": f"{world_size}; micro-batches on each: {shape.accumulation}, of {shape.micro_batch} x "
        f"{args.seq_length} tokens",
        "FLOPs/token": about["FLOPs/token"],
        "length": f"{steps:,} steps, {steps * each:,} tokens",
    }
    print(in_lines(rows), flush=True)


def prepare_text(args: argparse.Namespace, cache: Path) -> None:
    from deepspeed_sdp.data import CorpusSpec, prepare_corpus

    print("preparing the text ...", flush=True)
    spec = CorpusSpec(
        text_files=tuple(args.text or ()),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        seq_length=args.seq_length,
        holdout_fraction=args.heldout_fraction,
        max_bytes=int(args.max_text_mb * 1e6),
    )
    corpus = prepare_corpus(cache, spec, progress=True)
    print(f"text: {corpus.train_tokens:,} tokens to train on, {corpus.heldout_tokens:,} held out", flush=True)


def full_config(args: argparse.Namespace, corpus: "Corpus") -> Any:
    """The model's config with the tokenizer's vocabulary and room for the sequences."""
    from deepspeed_sdp.pretraining.job import model_config

    return model_config(Path(args.model_config), corpus.train.shape[1], corpus.tokenizer_folder)


def dense_config(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed config without an SDP block."""
    from deepspeed_sdp.config import BLOCK, read_json

    config = read_json(args.deepspeed_config, "--deepspeed_config")
    return {key: value for key, value in config.items() if key != BLOCK}


def measure_dense(args: argparse.Namespace, corpus: "Corpus", bucket_numel: int) -> list[dict[str, int]]:
    """Collective. Model state of plain DeepSpeed with the dense model: one step, measured on the live tensors.

    Its buckets of gradients are as large as SDP's, whose default is another.
    """
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from deepspeed_sdp.engine import gradient_peak, model_state_bytes
    from deepspeed_sdp.pretraining.loop import from_all_ranks, train_step, with_peak
    from deepspeed_sdp.pretraining.text import PackedText

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(full_config(args, corpus), trust_remote_code=False)
    config = dense_config(args)
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "reduce_bucket_size": bucket_numel}
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    size = engine.train_micro_batch_size_per_gpu()
    batches = PackedText.of(corpus, args.seed).batches(dist.get_rank(), dist.get_world_size(), size, 0)
    with gradient_peak(engine) as peak:
        train_step(engine, [next(batches) for _ in range(engine.gradient_accumulation_steps())])
    return from_all_ranks(with_peak(model_state_bytes(engine), peak.nbytes))


if __name__ == "__main__":
    main(sys.argv[1:])
