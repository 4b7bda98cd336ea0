"""Dense DeepSpeed, saving and loading."""

import deepspeed
import torch
import torch.distributed as dist

from tests.engine.cases import build_model, ds_config, run_steps
from tests.engine.checkpoint_cases import SCHEDULER, start


def dense(ds, **extra):
    engine, *_ = deepspeed.initialize(model=build_model(), config=ds_config(**ds, scheduler=SCHEDULER, **extra))
    return engine


def state_of(engine):
    """fp32 weights and moments of a dense job, by full name; DeepSpeed's own way to them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.module.named_parameters():
        found[f"master.{name}"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"optimizer.{key}.{name}"] = safe_get_full_optimizer_state(parameter, key)
    return {name: value.detach().clone().view(-1) for name, value in found.items()}


def train_dense(folder, ds, steps=3):
    """Train and save; state, and the losses that follow."""
    engine = dense(ds)
    run_steps(engine, steps)
    engine.save_checkpoint(folder, client_state={"consumed": 17})
    state = state_of(engine)
    losses = run_steps(engine, 2, seed=9)["losses"]
    engine.destroy()
    return state, losses


def take_up(folder, sdp, ds, out):
    """Into SDP, and out again."""
    engine = start(sdp, ds, seed=1)
    path, client_state = engine.load_checkpoint(folder)
    engine.save_checkpoint(out)
    result = {"path": path, "client_state": client_state, "steps": engine.global_steps, "lr": engine.get_lr()}
    result["losses"] = run_steps(engine, 2, seed=9)["losses"]
    engine.destroy()
    return result


def take_up_dense(folder, ds):
    """An exported universal checkpoint in dense DeepSpeed."""
    engine = dense(ds, checkpoint={"load_universal": True})
    with torch.no_grad():
        _, client_state = engine.load_checkpoint(folder)
    state = state_of(engine)
    result = (state, client_state, engine.global_steps, engine.get_lr(), run_steps(engine, 2, seed=9)["losses"])
    engine.destroy()
    dist.barrier()
    return result
