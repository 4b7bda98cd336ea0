"""Training through features of DeepSpeed and torch that users combine with SDP."""

import io
import logging
from contextlib import ExitStack, nullcontext
from functools import partial
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import logger

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, face, owned_weights, run_steps
from tests.support.models import token_batches


def start(sdp=None, model=None, family="llama", meta=False, **ds):
    module = build_model(family, model, meta)
    return deepspeed_sdp.initialize(model=module, config=ds_config(**ds), sdp_config=sdp or {"coverage": 0.5})


def own_accumulation(how, stage, micro=3, steps=4, **values):
    """``micro`` backward passes per step, which DeepSpeed is not told of.

    ``how``: "no_sync" (but for the last), "plain" (each reduced),
    or "torch" (``loss.backward()`` instead of ``engine.backward``).
    """
    engine, *_ = start(stage=stage, clip=1.0, **values)
    norms = []
    for step in token_batches(steps, dist.get_world_size(), micro):
        for i, ids in enumerate(step[dist.get_rank()]):
            is_silent = how == "no_sync" and i < micro - 1
            with engine.no_sync() if is_silent else nullcontext():
                loss = engine(input_ids=ids, labels=ids).loss / micro
                loss.backward() if how == "torch" else engine.backward(loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    result = {"norms": norms, **face(engine)}
    engine.destroy()
    return result


def compiled(how, stage, backend, steps=3, **values):
    """``how``: "engine" (``engine.compile``), "layers" (each on its own) or "" (eager)."""
    engine, *_ = start(stage=stage, **values)
    if how == "engine":
        engine.compile(backend=backend)
    elif how == "layers":
        for layer in engine.module.model.layers:
            layer.compile(backend=backend)
    result = {**run_steps(engine, steps), **face(engine)}
    torch._dynamo.reset()
    engine.destroy()
    return result


def checkpointed(reentrant, stage, steps=3, **values):
    engine, *_ = start(stage=stage, **values)
    engine.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        engine.module.enable_input_require_grads()
    result = {**run_steps(engine, steps), **face(engine)}
    engine.destroy()
    return result


def monitored(folder):
    config = {
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"},
        "wall_clock_breakdown": True,
        "steps_per_print": 1,
    }
    engine, *_ = start(stage=2, **config)
    result = {**run_steps(engine, 3), "stats": engine.sdp_stats()}
    engine.destroy()
    return result


def not_finite(action, stage, bad_rank=2, bad_step=1, name="model.layers.1.mlp.up_proj", value="nan", **more):
    """One rank's gradient of one parameter is ``value`` at one step; the error, what was logged, and the weights."""
    engine, *_ = start(sdp={"coverage": 0.5, "comm": {"on_nonfinite": action}, **more}, stage=stage)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    error, snapshots, state = None, [owned_weights(engine)], {"step": 0}

    def poison(gradient):
        bad = dist.get_rank() == bad_rank and state["step"] == bad_step
        return torch.full_like(gradient, float(value)) if bad else gradient

    for full, parameter in engine.module.named_parameters():
        if full.startswith(name) and parameter.requires_grad:
            parameter.register_hook(poison)
    try:
        for step, batches in enumerate(token_batches(bad_step + 2, dist.get_world_size())):
            state["step"] = step
            ids = batches[dist.get_rank()][0]
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            snapshots.append(owned_weights(engine))
    except deepspeed_sdp.SDPError as raised:
        error = type(raised).__name__, str(raised)
        snapshots.append(owned_weights(engine))
    finally:
        logger.removeHandler(handler)
    result = {"error": error, "log": stream.getvalue(), "snapshots": snapshots, "skipped": engine.skipped_steps}
    engine.destroy()
    return result


def inconsistent(stage, bad_rank, name, unit, interval=2, bad_step=4, **values):
    """One rank's copy of one unit changes by one bit before ``bad_step``; the error, and the steps done."""
    sdp = {"coverage": 0.5, "comm": {"consistency_check_interval": interval}, **values}
    engine, *_ = start(sdp=sdp, stage=stage)
    error = None
    try:
        for step in range(6):
            if step == bad_step - 1 and dist.get_rank() == bad_rank:
                flip(engine, name, unit)
            run_steps(engine, 1, seed=step)
    except deepspeed_sdp.SDPError as raised:
        error = type(raised).__name__, str(raised)
    result = {"error": error, "steps": engine.global_steps, "plan": engine.plan.to_json()}
    engine.destroy()
    return result


def flip(engine, full_name, unit):
    engine.optimizer.refresh.settle()
    for name, fragment in engine._subnetwork.fragments.items():
        if name in engine._subnetwork.views:
            continue
        if fragment.full_name == full_name and (fragment.dim is None or fragment.start <= unit < fragment.stop):
            with torch.no_grad():
                weight = dict(engine.module.named_parameters())[name]
                weight[unit - fragment.start].view(-1)[-1] *= 1 + 2**-20


# DeepSpeed asks whether the processor multiplies fp16 matrices natively; torch computes them in any case.
FP16_ANYWHERE = mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True)


def fp16(stage, power, steps=6, plain=False, sdp=None, **ds):
    """Losses, norms and the loss scale after every step, from a first scale of ``2**power``."""
    scaling = {"enabled": True, "initial_scale_power": power, "loss_scale_window": 3, "hysteresis": 1}
    with FP16_ANYWHERE:
        if plain:
            config = ds_config(stage, fp16=scaling, **ds)
            engine, *_ = deepspeed.initialize(model=build_model(), config=config)
        else:
            engine, *_ = start(sdp, stage=stage, fp16=scaling, **ds)
    scales, skipped, losses, norms = [], [], [], []
    for batches in token_batches(steps, dist.get_world_size()):
        ids = batches[dist.get_rank()][0]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        norms.append(float(engine.get_global_grad_norm()))
        scales.append(engine.optimizer.cur_scale)
        skipped.append(engine.skipped_steps)
    result = {"scales": scales, "skipped": skipped, "losses": losses, "norms": norms}
    if not plain:
        result.update(face(engine))
    engine.destroy()
    return result


def long_run(steps, **values):
    engine, *_ = start(**values)
    run_steps(engine, steps)
    result = face(engine)
    engine.destroy()
    return result


def around_the_engine(stage, steps=3, **values):
    """Accumulate over two micro-batches with the forward pass of the module, not of the engine."""
    engine, *_ = start(stage=stage, accumulation=2, bucket=1000, **values)
    norms = []
    for step in token_batches(steps, dist.get_world_size(), 2):
        for ids in step[dist.get_rank()]:
            engine.backward(engine.module(input_ids=ids, labels=ids).loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    result = {"norms": norms, **face(engine)}
    engine.destroy()
    engine.destroy()
    return result


def unusual_passes(how, stage, tied, **values):
    """One step of two backward passes: the norm, or the error.

    ``how``: "retain" (twice through one graph), "no_grad" and "evaluate" (in between), "gathered" (DeepSpeed's tool
    around each), "weights" (of each layer around the backward pass), or "two_forwards" (one sum).
    """
    engine, *_ = start(stage=stage, model={"tie_word_embeddings": tied}, **values)
    first, second = (step[dist.get_rank()][0] for step in token_batches(2, dist.get_world_size()))
    gathered = partial(GatheredParameters, [p for p in engine.module.parameters() if hasattr(p, "ds_id")])
    try:
        with gathered() if how == "gathered" else nullcontext():
            loss = engine(input_ids=first, labels=first).loss
        if how == "gathered":
            with gathered():
                engine.backward(loss)
        elif how == "weights":
            with ExitStack() as stack:
                for layer in (None, 0, 1, 2):
                    stack.enter_context(engine.gathered_weights(layer))
                engine.backward(loss)
        elif how == "retain":
            engine.backward(loss, retain_graph=True)
            engine.backward(loss)
        elif how == "two_forwards":
            engine.backward(loss + engine(input_ids=second, labels=second).loss)
        else:
            if how == "no_grad":
                with torch.no_grad():
                    engine(input_ids=second, labels=second)
            else:
                engine.evaluate_full([{"input_ids": second, "labels": second}])
            engine.backward(loss)
        engine.step()
        return float(engine.get_global_grad_norm())
    except deepspeed_sdp.SDPError as error:
        return str(error)
    finally:
        engine.destroy()


def failed_backward():
    """Every rank fails in the middle of a backward pass and tries to go on; the second error."""
    engine, *_ = start(stage=2)
    ids = token_batches(1, dist.get_world_size())[0][dist.get_rank()][0]

    def fail(_):
        raise ValueError("out of luck")

    hook = engine.module.model.layers[1].mlp.up_proj.weight.register_hook(fail)
    errors = []
    for _ in range(2):
        try:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
        hook.remove()
    dist.barrier()
    engine.destroy()
    return errors


def left_out(stage, sdp=None):
    """The optimizer is given all but the embeddings: their gradients must not pile up."""
    module = build_model()
    parameters = [p for name, p in module.named_parameters() if "embed" not in name]
    engine, *_ = deepspeed_sdp.initialize(
        model=module, model_parameters=parameters, config=ds_config(stage), sdp_config=sdp or {"coverage": 0.5}
    )
    run_steps(engine, 2)
    result = engine.module.model.embed_tokens.weight.grad is None
    engine.destroy()
    return result
