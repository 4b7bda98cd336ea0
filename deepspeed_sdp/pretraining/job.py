"""What a recipe amounts to on the ranks at hand, and the engine of it."""

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
from deepspeed_sdp.engine import check_copies, check_supported, initialize, initialize_dense
from deepspeed_sdp.estimate.flops import FlopsPerToken, flops_per_token
from deepspeed_sdp.estimate.gpu import gpu_of_device
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.pretraining.length import Length, make_length
from deepspeed_sdp.pretraining.loop import LoopSettings
from deepspeed_sdp.pretraining.recipe import Recipe
from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config


@dataclass(frozen=True)
class Job:
    """A recipe on so many ranks.

    Attributes:
        recipe: what was read.
        model: the full model, on the meta device.
        plan: who owns what; of the dense baseline: everybody everything.
        flops: training FLOPs per token.
        length: steps and tokens.
        micro_batches: gradient accumulation steps.
        world_size: ranks.
        how_long: where the length is from.
    """

    recipe: Recipe
    model: nn.Module
    plan: SubnetworkPlan
    flops: FlopsPerToken
    length: Length
    micro_batches: int
    world_size: int
    how_long: str


def make_job(recipe: Recipe, world_size: int, tokenizer_folder: Path | None = None, steps: int | None = None) -> Job:
    """A pure function of its arguments and of the tokenizer; nothing takes memory.

    Args:
        tokenizer_folder: the model's vocabulary is this tokenizer's; ``None``: as in the model's config.
        steps: instead of those that follow from the recipe.

    Raises:
        ConfigError, ModelError, PlanError: the recipe does not fit the model or the ranks.
    """
    about = recipe.about
    config = model_config(recipe.model_file, about.seq_length, tokenizer_folder, "pretraining.model")
    # Whether it can be done; engines turn the cache off themselves, and save the config as it was.
    separate_documents(copy.copy(config), about.document_reset, int(recipe.ds_config["train_micro_batch_size_per_gpu"]))
    model = meta_model(config, "pretraining.model")
    micro_batches = recipe.micro_batches(world_size)
    sdp = recipe.sdp if recipe.sdp.enabled else SDPConfig.parse({"coverage": 1.0, "seq_length": about.seq_length})
    plan = plan_for(model, sdp, world_size)
    flops = flops_per_token(model, about.seq_length, recipe.sdp, plan)
    length = make_length(
        about.tokens, about.match, int(recipe.ds_config["train_batch_size"]) * about.seq_length, flops.mean, flops.dense
    )
    how_long = f"matched by {about.match}"
    if steps is not None:
        how_long = "by --steps"
        length = Length(steps, length.tokens_per_step, flops.mean, flops.dense, about.tokens)
    return Job(recipe, model, plan, flops, length, micro_batches, world_size, how_long)


def model_config(path: Path, seq_length: int, tokenizer_folder: Path | None, key: str = "--model_config") -> Any:
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
    recipe = job.recipe
    config = recipe.for_steps(job.length.steps)
    if recipe.about.activation_checkpointing:
        model: Any = job.model
        model.gradient_checkpointing_enable()
    if not recipe.sdp.enabled:
        return initialize_dense(job.model, config, recipe.sdp.seed)
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


def loop_settings(job: Job, engine: Any, output: Path, known_peak: float | None) -> LoopSettings:
    """How the loop runs; ``known_peak``: FLOPs per second of the device, else by its name."""
    about = job.recipe.about
    worker = getattr(engine, "subnetwork_index", None)
    return LoopSettings(
        output=output,
        steps=job.length.steps,
        tokens_per_step=job.length.tokens_per_step,
        flops_per_token=job.flops.dense if worker is None else job.flops.workers[worker],
        peak_flops=known_peak or peak_flops(job.recipe.ds_config),
        log_interval=about.log_interval,
        eval_interval=about.eval_interval,
        checkpoint_interval=about.checkpoint_interval,
        eval_sequences=about.eval_sequences,
        calibration_sequences=job.recipe.sdp.calibration_sequences,
    )


def describe(job: Job) -> dict[str, str]:
    """What will be done, for a person."""
    recipe, length, flops = job.recipe, job.length, job.flops
    total = sum(parameter.numel() for parameter in job.model.parameters())
    batch, micro = (recipe.ds_config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu"))
    who = method(recipe.sdp, job.plan, total) if recipe.sdp.enabled else "dense baseline, plain DeepSpeed"
    against = length.flops / length.dense_flops
    rows = {
        "recipe": str(recipe.path),
        "model": f"{type(job.model).__name__}, {total / 1e6:,.1f} M parameters",
        "method": who,
        "ranks": f"{job.world_size}, global batch {batch} sequences of {recipe.about.seq_length} tokens "
        f"({job.micro_batches} micro-batches of {micro} on each)",
        "FLOPs/token": flops_in_words(flops),
        "length": f"{job.how_long}: {length.steps:,} steps, {_tokens(length.tokens)}, {length.flops:.3g} FLOPs",
        "baseline": f"{_tokens(length.dense_tokens)}, {length.dense_flops:.3g} FLOPs: this run takes "
        f"{length.tokens / length.dense_tokens:.3f} of its tokens, {against:.3f} of its FLOPs",
    }
    params = recipe.for_steps(length.steps).get("scheduler", {}).get("params", {})
    if "warmup_num_steps" in params:
        rows["schedule"] = f"{recipe.ds_config['scheduler']['type']}, warm-up {params['warmup_num_steps']} steps" + (
            f", to the end of {params['total_num_steps']}" if "total_num_steps" in params else ""
        )
    return rows


def in_lines(rows: Mapping[str, str]) -> str:
    """What :func:`describe` says, a line for each."""
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def method(sdp: SDPConfig, plan: SubnetworkPlan, numel: int) -> str:
    """SDP in words, for a full model of ``numel`` parameters."""
    most = numel - plan.total_numel + max(plan.owned_numel(w) for w in range(plan.num_subnetworks))
    return (
        f"SDP, {sdp.masking} masking by {sdp.granularity}, {plan.num_subnetworks} subnetworks, coverage "
        f"{plan.coverage:.3g}: each worker trains {most / 1e6:,.1f} M parameters ({most / numel:.0%})"
    )


def flops_in_words(flops: FlopsPerToken) -> str:
    """Per token, of the full model and of the workers."""
    return (
        f"dense {_short(flops.dense)}, worker {_short(flops.mean)} ({flops.mean / flops.dense:.3f}; "
        f"largest {flops.max / flops.mean:.3f} of the mean)"
    )


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.1f} M tokens" if count >= 1e6 else f"{count:,.0f} tokens"


def _short(flops: float) -> str:
    return f"{flops / 1e9:,.3g} G" if flops >= 1e8 else f"{flops / 1e6:,.3g} M"
