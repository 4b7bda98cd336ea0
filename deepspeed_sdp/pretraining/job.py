"""What a run amounts to on the ranks at hand, and the engine of it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from deepspeed_sdp.config import SDPConfig, SDPSource
from deepspeed_sdp.data import load_tokenizer, separate_documents, vocab_size
from deepspeed_sdp.engine import (
    check_apart,
    check_copies,
    check_supported,
    initialize,
    initialize_dense,
    zero_stage,
)
from deepspeed_sdp.estimate.flops import FlopsPerToken, flops_per_token
from deepspeed_sdp.estimate.gpu import gpu_of_device
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.pretraining.length import Length, make_length
from deepspeed_sdp.pretraining.loop import LoopSettings
from deepspeed_sdp.pretraining.recipe import Run
from deepspeed_sdp.pretraining.sources import expected_vocab
from deepspeed_sdp.report import RunFacts, count_parameters
from deepspeed_sdp.report.facts import millions
from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config


@dataclass
class Job:
    """A run on so many ranks.

    Attributes:
        run: what was read.
        model: the full model, on the meta device; :func:`build_engine` cuts it.
        plan: who owns what; of the dense baseline: everybody everything.
        flops: training FLOPs per token.
        facts: what of these is shown.
        length: steps and tokens.
        micro_batches: gradient accumulation steps.
        world_size: ranks.
        how_long: where the length is from.
    """

    run: Run
    model: nn.Module
    plan: SubnetworkPlan
    flops: FlopsPerToken
    facts: RunFacts
    length: Length
    micro_batches: int
    world_size: int
    how_long: str


def make_plan_of(
    run: Run, world_size: int, tokenizer_folder: Path | None = None, backend: str = "nccl"
) -> SubnetworkPlan:
    """The plan that :func:`make_job` takes; many ranks make it once, as it can take seconds.

    Raises:
        ConfigError, ModelError, PlanError: see :func:`make_job`.
    """
    sdp = run.sdp if run.sdp.enabled else SDPConfig.parse({"coverage": 1.0}).at_length(run.data.seq_length)
    return plan_for(meta_model(_config(run, tokenizer_folder), "model.path"), sdp, world_size, backend)


def make_job(
    run: Run, world_size: int, tokenizer_folder: Path | None = None, plan: SubnetworkPlan | None = None
) -> Job:
    """A pure function of its arguments and of the tokenizer; nothing takes memory.

    Args:
        tokenizer_folder: the model's vocabulary is this tokenizer's; ``None``: as in the model's config, or of the size
            that a tokenizer will be trained to.
        plan: what :func:`make_plan_of` made; made here if not given.

    Raises:
        ConfigError, ModelError, PlanError: the run does not fit the model or the ranks.
    """
    data = run.data
    config = _config(run, tokenizer_folder)
    micro_batches, micro_batch = run.micro_batches(world_size), run.micro_batch(world_size)
    # Whether it can be done; engines turn the cache off themselves, and save the config as it was.
    separate_documents(copy.copy(config), data.document_reset, micro_batch)
    model = meta_model(config, "model.path")
    plan = plan or make_plan_of(run, world_size, tokenizer_folder)
    if run.sdp.enabled:
        check_apart(zero_stage(run.ds_config), run.sdp, world_size // plan.num_subnetworks)
    flops = flops_per_token(model, data.seq_length, run.sdp, plan)
    tokens_per_step = run.global_batch(world_size) * data.seq_length
    facts = make_facts(model, run.sdp, plan, flops, tokens_per_step)
    length, how_long = _length(run, tokens_per_step, flops)
    return Job(run, model, plan, flops, facts, length, micro_batches, world_size, how_long)


def _config(run: Run, tokenizer_folder: Path | None) -> Any:
    config = model_config(run.model_file, run.data.seq_length, tokenizer_folder)
    size = expected_vocab(run.data)
    if tokenizer_folder is None and size is not None:
        config.vocab_size = size
    return config


def _length(run: Run, tokens_per_step: int, flops: FlopsPerToken) -> tuple[Length, str]:
    said = run.length
    if said.steps is None:
        assert said.tokens is not None
        length = make_length(said.tokens, said.match, tokens_per_step, flops.mean, flops.dense)
        return length, f"matched by {said.match}"
    tokens = said.tokens or said.steps * tokens_per_step
    return Length(said.steps, tokens_per_step, flops.mean, flops.dense, tokens), "by steps"


def make_facts(
    model: nn.Module, sdp: SDPConfig, plan: SubnetworkPlan, flops: FlopsPerToken, tokens_per_step: int
) -> RunFacts:
    """What a run shows of itself; ``model``: the full one, not cut yet."""
    return RunFacts(
        model_class=type(model).__name__,
        parameters=count_parameters(model),
        plan=plan,
        masking=sdp.masking if sdp.enabled else "dense",
        granularity=sdp.granularity,
        tokens_per_step=tokens_per_step,
        dense_flops_per_token=flops.dense,
        flops_per_token=flops.workers or (flops.dense,) * plan.num_subnetworks,
    )


def model_config(path: Path, seq_length: int, tokenizer_folder: Path | None, key: str = "model.path") -> Any:
    """The model's config with the tokenizer's vocabulary and room for the sequences.

    Raises:
        ConfigError, DataError: one of the two cannot be read.
    """
    config = read_model_config(path, key)
    if tokenizer_folder is not None:
        tokenizer = load_tokenizer(tokenizer_folder)
        config.vocab_size = vocab_size(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    config.max_position_embeddings = max(config.max_position_embeddings, seq_length)
    return config


def build_engine(job: Job) -> Any:
    """Collective. The engine: of a subnetwork, or of the dense baseline.

    Raises:
        ConfigError: see :func:`deepspeed_sdp.initialize`.
    """
    run = job.run
    config = run.for_steps(job.length.steps)
    if run.model.activation_checkpointing:
        model: Any = job.model
        model.gradient_checkpointing_enable()
    if not run.sdp.enabled:
        return initialize_dense(job.model, config, run.sdp.plan.seed)
    engine, *_ = initialize(model=job.model, config=config)
    return engine


def check(ds_config: Mapping[str, Any], sdp: SDPSource, model: nn.Module, plan: SubnetworkPlan) -> None:
    """What :func:`deepspeed_sdp.initialize` would find wrong with settings, by one process.

    Raises:
        ConfigError, ModelError: see there.
    """
    check_supported(ds_config, SDPConfig.of(sdp), model, None, None)
    check_copies(SDPConfig.of(sdp), plan)


def peak_flops(ds_config: Mapping[str, Any]) -> float | None:
    """FLOPs per second of this rank's accelerator in the precision of a config, by the table of ``estimate``."""
    if not torch.cuda.is_available() or get_accelerator().device_name() == "cpu":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    is_on = {key: bool(ds_config.get(key, {}).get("enabled")) for key in ("bf16", "fp16")}
    dtype = torch.bfloat16 if is_on["bf16"] else torch.float16 if is_on["fp16"] else torch.float32
    return gpu.flops(dtype) if gpu is not None else None


def loop_settings(job: Job, output: Path) -> LoopSettings:
    """How the loop runs."""
    said = job.run.logging
    known_peak = said.peak_tflops and said.peak_tflops * 1e12
    return LoopSettings(
        output=output,
        steps=job.length.steps,
        peak_flops=known_peak or peak_flops(job.run.ds_config),
        log_interval=said.log_interval,
        eval_interval=said.eval_interval,
        checkpoint_interval=said.checkpoint_interval,
        eval_sequences=said.eval_sequences,
        calibration_sequences=job.run.sdp.calibration_sequences,
    )


def describe(job: Job) -> dict[str, str]:
    """What will be done, for a person."""
    run, length, facts = job.run, job.length, job.facts.describe()
    batch, micro = run.global_batch(job.world_size), run.micro_batch(job.world_size)
    against = length.flops / length.dense_flops
    rows = {
        "run": run.title,
        "model": facts["model"],
        "method": facts["method"],
        **_source_row(run),
        "ranks": f"{job.world_size}, global batch {batch} sequences of {run.data.seq_length} tokens "
        f"({job.micro_batches} micro-batches of {micro} on each)",
        "FLOPs/token": facts["FLOPs/token"],
        "length": f"{job.how_long}: {length.steps:,} steps, {_tokens(length.tokens)}, {length.flops:.3g} FLOPs",
        "baseline": f"{_tokens(length.dense_tokens)}, {length.dense_flops:.3g} FLOPs: this run takes "
        f"{length.tokens / length.dense_tokens:.3f} of its tokens, {against:.3f} of its FLOPs",
    }
    if changes := run.sdp.schedule.describe(length.steps):
        rows["changes"] = changes
    params = run.for_steps(length.steps).get("scheduler", {}).get("params", {})
    if "warmup_num_steps" in params:
        rows["schedule"] = f"{run.ds_config['scheduler']['type']}, warm-up {params['warmup_num_steps']} steps" + (
            f", to the end of {params['total_num_steps']}" if "total_num_steps" in params else ""
        )
    return rows


def _source_row(run: Run) -> dict[str, str]:
    data = run.data
    if data.source is None:
        return {}
    said = getattr(data, data.source)
    if data.weights is not None:
        total = sum(data.weights)
        shares = zip(said, data.weights, strict=True)
        return {"data": "stream, mixed: " + ", ".join(f"{share / total:.1%} {path}" for path, share in shares)}
    return {"data": f"{data.source} {said if isinstance(said, str) else ' '.join(said)}"}


def _tokens(count: float) -> str:
    return f"{millions(count)} tokens" if count >= 1e6 else f"{count:,.0f} tokens"
