"""What the ranks run. Every function is called on all ranks at once."""

import importlib
import os
import random
import time
from contextlib import nullcontext
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.engine.comm import mesh
from tests.support.models import tiny_model, token_batches


def ds_config(stage=1, *, bf16=False, clip=0.0, accumulation=1, bucket=500_000, lr=1e-3, optimizer=True, **extra):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "steps_per_print": 10**9,
    }
    if optimizer:
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": lr, "weight_decay": 0.1, "eps": 1e-5, "torch_adam": True},
        }
    if bf16:
        config["bf16"] = {"enabled": True}
    return {**config, **extra}


def build_model(family="llama", model=None, meta=False, frozen=(), checkpointing=False):
    module = tiny_model(family, meta=meta, **(model or {}))
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    if checkpointing:
        module.gradient_checkpointing_enable()
    return module


def train(
    model=None,
    sdp=None,
    ds=None,
    steps=5,
    seed=1,
    meta=False,
    family="llama",
    frozen=(),
    checkpointing=False,
    sleep=None,
    repeat=False,
):
    """Train a tiny model for ``steps``; losses, norms, full weights (rank 0), and this rank's weights."""
    module = build_model(family, model, meta, frozen, checkpointing)
    engine, *_ = deepspeed_sdp.initialize(model=module, config=ds_config(**(ds or {})), sdp_config=sdp or {})
    if sleep is not None:
        sleep_in_backward(engine.module, sleep)
    result = run_steps(engine, steps, seed, repeat)
    result.update(face(engine))
    engine.destroy()
    return result


def face(engine):
    """What a test wants to know of a trained engine."""
    held = {name: (engine._subnetwork.fragments[name], value) for name, value in owned_weights(engine).items()}
    frozen = engine._subnetwork.frozen
    return {
        "plan": engine.plan.to_json(),
        "workers": list(engine._owner_groups.workers),
        "owned": {name: item for name, item in held.items() if name not in frozen},
        "copies": {name: item for name, item in held.items() if name in frozen},
        "full": engine.full_state_dict(torch.float32),
        "stats": engine.sdp_stats(),
    }


def owned_weights(engine, dtype=torch.float32):
    """This rank's weights, at any ZeRO stage."""
    layers = tuple(f"{name}." for name in engine._subnetwork.layer_names)
    values = {}
    for layer in [None, *range(len(layers))]:
        with engine.gathered_weights(layer):
            values.update(
                {
                    name: p.detach().to(dtype, copy=True)
                    for name, p in engine.module.named_parameters()
                    if (not name.startswith(layers) if layer is None else name.startswith(layers[layer]))
                }
            )
    return {name: values[name] for name, _ in engine.module.named_parameters()}


def sleep_in_backward(module, seed, longest=0.01):
    """Every rank sleeps now and then in its backward pass, each at other places."""
    generator = random.Random(seed * 100 + dist.get_rank())

    def hook(_):
        if generator.random() < 0.2:
            time.sleep(generator.random() * longest)

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(hook)


def run_steps(engine, steps, seed=1, repeat=False):
    """Train; ``repeat`` takes the first step's batches again and again."""
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = engine.gradient_accumulation_steps()
    batches = token_batches(steps, world, micro, seed=seed)
    losses, norms = [], []
    for step in batches[:1] * steps if repeat else batches:
        loss_sum = 0.0
        for ids in step[rank]:
            ids = ids.to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            loss_sum += float(loss.detach()) / micro
        losses.append(loss_sum)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return {"losses": losses, "norms": norms}


def train_deepspeed(model=None, ds=None, steps=5, seed=1, family="llama"):
    """The same with DeepSpeed alone: losses, norms, and this rank's weights."""
    engine, *_ = deepspeed.initialize(model=build_model(family, model), config=ds_config(**(ds or {})))
    result = run_steps(engine, steps, seed)
    result["weights"] = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return result


def train_disabled(ds):
    engine, *_ = deepspeed_sdp.initialize(model=tiny_model(), config=ds_config(**ds), sdp_config={"enabled": False})
    result = {**run_steps(engine, 5), "engine": type(engine).__name__}
    engine.destroy()
    return result


def one_rank_overflows(stage, bf16, bad_step, bad_rank):
    """Rank ``bad_rank`` has an infinite loss at ``bad_step``; weights before it, after it, and one step later."""
    extra = {"bf16": {"enabled": True, "check_grad_overflow": True}} if bf16 else {}
    config = ds_config(stage, clip=1.0, bucket=4000, **extra)
    engine, *_ = deepspeed_sdp.initialize(model=tiny_model(), config=config, sdp_config={"coverage": 0.5})
    snapshots, losses = [], []
    for step, batches in enumerate(token_batches(bad_step + 2, dist.get_world_size())):
        ids = batches[dist.get_rank()][0]
        loss = engine(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        bad = step == bad_step and dist.get_rank() == bad_rank
        engine.backward(loss * float("inf") if bad else loss)
        engine.step()
        snapshots.append(owned_weights(engine))
    result = {"snapshots": snapshots, "skipped": engine.skipped_steps, "losses": losses, **face(engine)}
    engine.destroy()
    return result


def on_nodes(on_rank, ranks_per_node, has_short_rings=False, **kwargs):
    """``module:function`` on nodes of ``ranks_per_node`` ranks, as the launcher would number them.

    With ``has_short_rings`` few replicas are cut into levels like many.
    """
    module, function = on_rank.split(":")
    before = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    try:
        with mock.patch.multiple(mesh, _LAUNCH=0, _NODES=1) if has_short_rings else nullcontext():
            return getattr(importlib.import_module(module), function)(**kwargs)
    finally:
        mesh._rings.cache_clear()
        os.environ["LOCAL_WORLD_SIZE"] = before


def evaluate_and_save(folder, sdp, model=None, family="llama"):
    """Loss of the full model, streamed and gathered, and a HuggingFace folder."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(family, model), config=ds_config(), sdp_config=sdp)
    run_steps(engine, 2)
    ids = torch.arange(24).view(2, 12)
    streamed = engine.evaluate_full([{"input_ids": ids, "labels": ids}])
    with engine.full_model() as full:
        gathered = float(full(input_ids=ids, labels=ids).loss)
    engine.save_hf(folder)
    engine.destroy()
    return streamed, gathered
