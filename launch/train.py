"""Pretrain a causal language model with Subnetwork Data Parallelism, from raw text to a HuggingFace folder.

    deepspeed --num_accelerators 4 launch/train.py \\
        --deepspeed_config ds_configs/demo.json --sdp_config ds_configs/demo_sdp.json \\
        --model_config ds_configs/demo_model.json --steps 300 --output_dir runs/demo
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import check_arguments, parse_arguments

from deepspeed_sdp.errors import ConfigError, OutputError
from deepspeed_sdp.failures import on_first_rank, one_report

if TYPE_CHECKING:
    from deepspeed_sdp.data import Corpus

LOG_INTERVAL = 10


def main(argv: list[str]) -> None:
    args = parse_arguments(argv, __doc__)
    with one_report():
        check_arguments(args)
        train(args)


def train(args: argparse.Namespace) -> None:
    quiet(args.verbose)
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    import deepspeed_sdp
    from deepspeed_sdp.data import load_corpus
    from deepspeed_sdp.engine import Peak, check_job, gradient_peak, model_state_bytes, start_communication
    from deepspeed_sdp.report import RunReport
    from deepspeed_sdp.stopping import StopRequest
    from deepspeed_sdp.subnetwork import meta_model, read_model_config

    if args.local_rank >= 0:
        get_accelerator().set_device(args.local_rank)
    start_communication()
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(args.output_dir)
    cache = Path(args.data_cache) if args.data_cache else output / "data"
    on_first_rank(lambda: make_writable(output))
    # Before the text is prepared, which takes longer.
    sdp = check_job(lambda: meta_model(read_model_config(args.model_config)), args)
    if not sdp.enabled:
        raise ConfigError(
            "subnetwork_data_parallel.enabled: got false; takes true here (coverage 1 trains the dense model)"
        )
    on_first_rank(lambda: prepare_text(args, cache))
    corpus = load_corpus(cache)
    # On the meta device: only the subnetwork is ever given memory.
    model = meta_model(full_config(args.model_config, corpus))
    engine, *_ = deepspeed_sdp.initialize(args=args, model=model)
    steps = args.steps or tokens_to_steps(args.tokens, engine, args.seq_length)
    tokens_per_step = engine.train_batch_size() * args.seq_length

    evaluation = rank_slice(corpus.heldout, args.eval_sequences, rank, world)
    report = RunReport(
        plan=engine.plan, tokens_per_step=tokens_per_step, unigram_val_loss=corpus.unigram_val_loss, masking=sdp.masking
    )
    checkpoints = output / "checkpoints"
    done = 0 if args.restart else resume(engine, checkpoints, report)
    batches = training_batches(corpus, engine, args.seed)
    progress = progress_bar(steps, rank, done)
    losses: list[torch.Tensor] = []
    peak = Peak()
    stop = StopRequest()
    began = time.monotonic() - report.seconds
    for step in range(done + 1, steps + 1):
        if step == min(done + 2, steps):
            with gradient_peak(engine) as peak:
                losses.append(train_step(engine, batches))
        else:
            losses.append(train_step(engine, batches))
        if step % LOG_INTERVAL == 0 or step == steps:
            report.train_losses.append((step, mean_over_ranks(losses)))
            losses.clear()
            speed = step * tokens_per_step / (time.monotonic() - began)
            progress.set_postfix(
                loss=f"{report.train_loss:.3f}",
                val=f"{report.val_loss:.3f}" if report.val_losses else "-",
                tok_s=f"{speed:.0f}",
            )
        progress.update()
        if step % args.eval_interval == 0 and step < steps:
            report.val_losses.append((step, engine.evaluate_full(eval_batches(evaluation, engine))))
            write_monitor(engine, report)
        is_asked = stop.agreed()
        if is_asked or (args.checkpoint_interval and step % args.checkpoint_interval == 0):
            report.seconds = time.monotonic() - began
            saved = engine.save_checkpoint(checkpoints, client_state={"report": report.history()})
        if is_asked and step < steps:
            if not (engine.wait_for_checkpoint() and saved):
                raise OutputError(f"stopped at step {step}, and no checkpoint could be written to {checkpoints}")
            progress.close()
            if rank == 0:
                print(f"stopped at step {step}; the same command goes on from {checkpoints}", flush=True)
            dist.barrier()
            dist.destroy_process_group()
            return
    everything = rank_slice(corpus.heldout, 0, rank, world)
    report.val_losses.append((steps, engine.evaluate_full(eval_batches(everything, engine))))
    write_monitor(engine, report)
    progress.close()
    report.seconds = time.monotonic() - began
    engine.wait_for_checkpoint()

    engine.save_hf(output / "hf")
    state = model_state_bytes(engine)
    report.ranks = from_all_ranks({**engine.sdp_stats(), "model_state_bytes": with_peak(state, peak.nbytes)})
    on_first_rank(lambda: finish(report, corpus, output))
    if args.compare_dense:
        engine.destroy()
        # All that refers to the subnetwork's memory; the dense model may need it.
        del engine, model, batches
        report.dense_state_bytes = measure_dense(args, corpus)
        on_first_rank(lambda: finish(report, corpus, output))
    if rank == 0:
        print(report.closing_lines(output), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def quiet(verbose: bool) -> None:
    """Keep DeepSpeed's and the tokenizers' log off the progress bar. Before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        import logging
        import warnings

        os.environ.setdefault("DS_LOG_LEVEL", "error")
        # Ranks of a job that fails lose each other: torch would warn of it with stacks of C++ calls beside the error.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def make_writable(folder: Path) -> None:
    """Raise OutputError now rather than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"--output_dir: cannot write {folder}: {error.strerror or error}") from None


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


def full_config(path: str, corpus: "Corpus") -> Any:
    """The model's config with the tokenizer's vocabulary and room for the sequences."""
    from deepspeed_sdp.data import load_tokenizer
    from deepspeed_sdp.subnetwork import read_model_config

    config = read_model_config(path)
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.max_position_embeddings = max(config.max_position_embeddings, corpus.train.shape[1])
    return config


def tokens_to_steps(tokens: float, engine: Any, seq_length: int) -> int:
    return max(1, round(tokens / (engine.train_batch_size() * seq_length)))


def training_batches(corpus: "Corpus", engine: Any, seed: int) -> Iterator[dict[str, Any]]:
    import torch.distributed as dist

    from deepspeed_sdp.data import PackedDataset, RankSampler

    size = engine.train_micro_batch_size_per_gpu()
    dataset = PackedDataset(corpus.train)
    sampler = RankSampler(len(dataset), seed=seed)
    world = dist.get_world_size()
    # Where the samples that were trained on end, on however many ranks.
    for indices in sampler.batches(dist.get_rank(), world, size, engine.global_samples):
        yield to_device([dataset[int(i)] for i in indices], engine.device)


def eval_batches(sequences: Any, engine: Any) -> Iterator[dict[str, Any]]:
    from deepspeed_sdp.data import PackedDataset

    size = engine.train_micro_batch_size_per_gpu()
    dataset = PackedDataset(sequences)
    for start in range(0, len(dataset), size):
        yield to_device([dataset[i] for i in range(start, min(start + size, len(dataset)))], engine.device)


def to_device(items: list[dict[str, Any]], device: Any) -> dict[str, Any]:
    import torch

    return {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}


def rank_slice(sequences: Any, limit: int, rank: int, world: int) -> Any:
    """Every ``world``-th of the first ``limit`` sequences (0: all), as this rank's share."""
    return sequences[: limit or len(sequences)][rank::world]


def train_step(engine: Any, batches: Iterator[dict[str, Any]]) -> Any:
    """One optimizer step; the mean loss of its micro-batches, a scalar tensor."""
    total = 0.0
    micro_batches = engine.gradient_accumulation_steps()
    for _ in range(micro_batches):
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        engine.step()
        total = total + loss.detach() / micro_batches
    return total


def mean_over_ranks(losses: list[Any]) -> float:
    import torch
    import torch.distributed as dist

    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def resume(engine: Any, checkpoints: Path, report: Any) -> int:
    """Collective. Take up the latest checkpoint, if there is one; the steps done so far."""
    path, state = engine.load_checkpoint(checkpoints)
    if state is None:
        return 0
    report.set_history(state["report"])
    if engine.global_rank == 0:
        print(f"going on from {path}", flush=True)
    return int(engine.global_steps)


def progress_bar(steps: int, rank: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=steps, initial=done, disable=rank != 0, desc="train", unit="step", dynamic_ncols=True, mininterval=1.0
    )


def write_monitor(engine: Any, report: Any) -> None:
    if engine.monitor.enabled and engine.global_rank == 0:
        samples = engine.global_samples
        engine.monitor.write_events(
            [
                ("Train/Samples/loss", report.train_loss, samples),
                ("Train/Samples/full_model_val_loss", report.val_loss, samples),
            ]
        )


def with_peak(state: dict[str, int], peak: int) -> dict[str, int]:
    """Gradients come and go within a step: report their peak."""
    state = {**state, "gradients": peak}
    return {**state, "total": state["weights"] + state["gradients"] + state["optimizer"]}


def measure_dense(args: argparse.Namespace, corpus: "Corpus") -> list[dict[str, int]]:
    """Collective. Model state of plain DeepSpeed with the dense model: one step, measured on the live tensors."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from deepspeed_sdp.config import BLOCK, read_json
    from deepspeed_sdp.engine import gradient_peak, model_state_bytes

    config = {
        key: value for key, value in read_json(args.deepspeed_config, "--deepspeed_config").items() if key != BLOCK
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(full_config(args.model_config, corpus))
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    with gradient_peak(engine) as peak:
        train_step(engine, training_batches(corpus, engine, args.seed))
    return from_all_ranks(with_peak(model_state_bytes(engine), peak.nbytes))


def from_all_ranks(value: Any) -> list[Any]:
    """Collective: ``value`` of every rank, on every rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def finish(report: Any, corpus: "Corpus", output: Path) -> None:
    from deepspeed_sdp.data import load_tokenizer

    try:
        load_tokenizer(corpus.tokenizer_folder).save_pretrained(output / "hf")
        report.write(output)
    except OSError as error:
        raise OutputError(f"--output_dir: cannot write {output}: {error.strerror or error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
