"""Calibration, run on every rank."""

import torch
import torch.distributed as dist

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, owned_weights, run_steps


def _start(sdp, ds, family="llama", model=None, steps=3):
    engine, *_ = deepspeed_sdp.initialize(model=build_model(family, model), config=ds_config(**ds), sdp_config=sdp)
    run_steps(engine, steps)
    return engine


def _batches():
    generator = torch.Generator().manual_seed(70 + dist.get_rank())
    ids = torch.randint(0, 97, (2, 2, 12), generator=generator)
    return [{"input_ids": each, "labels": each} for each in ids]


def calibrate(**values):
    engine = _start(**values)
    batches = _batches()
    result = {
        "batches": batches,
        "before": engine.full_state_dict(torch.float32),
        "owned": list(owned_weights(engine).values()),
        "loss_before": engine.evaluate_full(batches),
        "scale": engine.calibrate(iter(batches)),
        "after": engine.full_state_dict(torch.float32),
        "owned_after": list(owned_weights(engine).values()),
        "loss_after": engine.evaluate_full(batches),
    }
    found = engine._subnetwork.full_scale
    beside = []
    for factor in (0.97, 1.03):
        engine._subnetwork.full_scale = found * factor
        beside.append(engine.evaluate_full(batches))
    engine.destroy()
    return {**result, "loss_beside": min(beside)}


def save_calibrated(folder, hf, **values):
    """The full model that is saved."""
    engine = _start(**values)
    engine.calibrate(_batches())
    engine.save_checkpoint(folder)
    engine.save_hf(hf)
    full = engine.full_state_dict(torch.float32)
    engine.destroy()
    return full


def load_and_save(folder, out, **values):
    """The full model that another job finds."""
    engine = _start(steps=1, **values)
    engine.load_checkpoint(folder)
    full = engine.full_state_dict(torch.float32)
    engine.save_checkpoint(out)
    engine.destroy()
    return full
