"""Calibration, run on every rank."""

import logging
from contextlib import contextmanager

import torch
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.adapters.tasks import CausalLM
from deepspeed_sdp.engine.full.calibration import halves, scales_to_try
from tests.engine.cases import build_model, ds_config, owned_weights, run_steps
from tests.support.models import token_batches


def _start(sdp, ds, family="llama", model=None, steps=30):
    """Trained on the same few sequences again and again, so that units have learned to pull together."""
    ds = {"lr": 5e-3, **ds}
    engine, *_ = deepspeed_sdp.initialize(model=build_model(family, model), config=ds_config(**ds), sdp_config=sdp)
    run_steps(engine, steps, repeat=True)
    return engine


def _batches():
    ids = token_batches(1, dist.get_world_size())[0][dist.get_rank()][0]
    return [{"input_ids": ids, "labels": ids}]


@contextmanager
def _warnings():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("deepspeed_sdp.engine.full.calibration")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def calibrate(**values):
    engine = _start(**values)
    batches = _batches()
    fitted, held_back, _ = halves(batches, CausalLM())

    def at(scale, part):
        engine.full_scale = scale
        return engine.evaluate_full(part)

    result = {
        "batches": batches,
        "before": engine.full_state_dict(torch.float32),
        "owned": list(owned_weights(engine).values()),
        "scale": engine.calibrate(iter(batches)),
        "after": engine.full_state_dict(torch.float32),
        "owned_after": list(owned_weights(engine).values()),
        "loss_after": engine.evaluate_full(batches),
        "tried": scales_to_try(engine.plan, engine.sdp_config),
    }
    scale = engine.full_scale
    result["held_back"] = [at(each, held_back) for each in (1.0, scale)]
    result["fitted"] = [at(scale * factor, fitted) for factor in (0.97, 1.0, 1.03)]
    engine.destroy()
    return result


def calibrate_untrained(few=False, **values):
    """What is found, what is said, and the loss where the model is nearly silent."""
    engine = _start(**values)
    ids = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(70 + dist.get_rank()))
    batches = [{"input_ids": ids, "labels": ids}]
    if few:
        batches = [{name: value[:1] for name, value in batches[0].items()}] if dist.get_rank() == 2 else []
    with _warnings() as said:
        scale = engine.calibrate(batches)
    losses = {scale: engine.evaluate_full(batches)}
    for silent in (0.3, 1.0):
        engine.full_scale = silent
        losses[silent] = engine.evaluate_full(batches)
    result = {"scale": scale, "said": said, "losses": losses, "tried": scales_to_try(engine.plan, engine.sdp_config)}
    engine.destroy()
    return result


def split(rows, without=()):
    """The ids of both halves of 24 sequences, dealt in micro-batches of ``rows``."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.arange(24)[:, None].expand(24, 5)
    labels = torch.where(torch.isin(ids, torch.tensor(without)), -100, ids)
    mine = [slice(first, first + rows) for first in range(rank * rows, 24, world * rows)]
    fitted, held_back, count = halves(({"input_ids": ids[each], "labels": labels[each]} for each in mine), CausalLM())
    return *(
        [row for batch in half for row in batch["input_ids"][:, 0].tolist()] for half in (fitted, held_back)
    ), count


def save_calibrated(folder, hf, **values):
    """The full model that is saved."""
    engine = _start(**values)
    assert engine.calibrate(_batches()) != 1.0
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
