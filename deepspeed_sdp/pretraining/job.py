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
from deepspeed_sdp.report import RunFacts, count_parameters
from deepspeed_sdp.report.facts import millions
from deepspeed_sdp.subnetwork import meta_model, plan_for, read_model_config


@dataclass(frozen=True)
class Job:
    """A recipe on so many ranks.

    Attributes:
        recipe: what was read.
        model: the full model, on the meta device; :func:`build_engine` cuts it.
        plan: who owns what; of the dense baseline: everybody everything.
        flops: training FLOPs per token.
        facts: what of these is shown.
        length: steps and tokens.
        micro_batches: gradient accumulation steps.
        world_size: ranks.
        how_long: where the length is from.
    """

    recipe: Recipe
    model: nn.Module
    plan: SubnetworkPlan
    flops: FlopsPerToken
    facts: RunFacts
    length: Length
    micro_batches: int
    world_size: int
    how_long: str


def make_plan_of(
    recipe: Recipe, world_size: int, tokenizer_folder: Path | None = None, backend: str = "nccl"
) -> SubnetworkPlan:
    """The plan that :func:`make_job` takes; many ranks make it once, as it can take seconds.

    Raises:
        ConfigError, ModelError, PlanError: see :func:`make_job`.
    """
    seq_length = recipe.about.seq_length
    config = model_config(recipe.model_file, seq_length, tokenizer_folder, "pretraining.model")
    sdp = recipe.sdp if recipe.sdp.enabled else SDPConfig.parse({"coverage": 1.0}).at_length(seq_length)
    return plan_for(meta_model(config, "pretraining.model"), sdp, world_size, backend)


def make_job(
    recipe: Recipe,
    world_size: int,
    tokenizer_folder: Path | None = None,
    steps: int | None = None,
    plan: SubnetworkPlan | None = None,
) -> Job:
    """A pure function of its arguments and of the tokenizer; nothing takes memory.

    Args:
        tokenizer_folder: the model's vocabulary is this tokenizer's; ``None``: as in the model's config.
        steps: instead of those that follow from the recipe.
        plan: what :func:`make_plan_of` made; made here if not given.

    Raises:
        ConfigError, ModelError, PlanError: the recipe does not fit the model or the ranks.
    """
    about = recipe.about
    config = model_config(recipe.model_file, about.seq_length, tokenizer_folder, "pretraining.model")
    # Whether it can be done; engines turn the cache off themselves, and save the config as it was.
    separate_documents(copy.copy(config), about.document_reset, int(recipe.ds_config["train_micro_batch_size_per_gpu"]))
    model = meta_model(config, "pretraining.model")
    micro_batches = recipe.micro_batches(world_size)
    plan = plan or make_plan_of(recipe, world_size, tokenizer_folder)
    flops = flops_per_token(model, about.seq_length, recipe.sdp, plan)
    tokens_per_step = int(recipe.ds_config["train_batch_size"]) * about.seq_length
    facts = make_facts(model, recipe.sdp, plan, flops, tokens_per_step)
    length = make_length(about.tokens, about.match, tokens_per_step, flops.mean, flops.dense)
    how_long = f"matched by {about.match}"
    if steps is not None:
        how_long = "by --steps"
        length = Length(steps, length.tokens_per_step, flops.mean, flops.dense, about.tokens)
    return Job(recipe, model, plan, flops, facts, length, micro_batches, world_size, how_long)


def make_facts(
    model: nn.Module, sdp: SDPConfig, plan: SubnetworkPlan, flops: FlopsPerToken, tokens_per_step: int = 0
) -> RunFacts:
    """What a run shows of itself.

    Args:
        model: the full model, not cut yet.
        tokens_per_step: 0: only the engine will know.
    """
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
        return initialize_dense(job.model, config, recipe.sdp.plan.seed)
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


def loop_settings(job: Job, output: Path, known_peak: float | None) -> LoopSettings:
    """How the loop runs; ``known_peak``: FLOPs per second of the device, else by its name."""
    about = job.recipe.about
    return LoopSettings(
        output=output,
        steps=job.length.steps,
        peak_flops=known_peak or peak_flops(job.recipe.ds_config),
        log_interval=about.log_interval,
        eval_interval=about.eval_interval,
        checkpoint_interval=about.checkpoint_interval,
        eval_sequences=about.eval_sequences,
        calibration_sequences=job.recipe.sdp.calibration_sequences,
    )


def describe(job: Job) -> dict[str, str]:
    """What will be done, for a person."""
    recipe, length, facts = job.recipe, job.length, job.facts.describe()
    batch, micro = (recipe.ds_config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu"))
    against = length.flops / length.dense_flops
    rows = {
        "recipe": recipe.title,
        "model": facts["model"],
        "method": facts["method"],
        "ranks": f"{job.world_size}, global batch {batch} sequences of {recipe.about.seq_length} tokens "
        f"({job.micro_batches} micro-batches of {micro} on each)",
        "FLOPs/token": facts["FLOPs/token"],
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


def _tokens(count: float) -> str:
    return f"{millions(count)} tokens" if count >= 1e6 else f"{count:,.0f} tokens"
