"""Packed documents on the engine."""

import numpy as np
import torch
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.data.separation import packed_example
from tests.engine.cases import build_model, ds_config


def packed_batch(seed, reset):
    draw = np.random.default_rng(seed)
    rows = [packed_example(draw.integers(0, 97, 24), np.array(starts), reset) for starts in ([5, 13], [9])]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def train_packed(reset, sdp, checkpointing=False, stage=1):
    """Three steps, then the loss of the full model, and its weights (rank 0)."""
    model = build_model("llama", checkpointing=checkpointing)
    engine, *_ = deepspeed_sdp.initialize(model=model, config=ds_config(stage=stage), sdp_config=sdp)
    losses = []
    for step in range(3):
        loss = engine(**packed_batch(10 * step + dist.get_rank(), reset)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    value = engine.evaluate_full([packed_batch(100 + dist.get_rank(), reset)])
    full = engine.full_state_dict(torch.float32)
    engine.destroy()
    return {"losses": losses, "value": value, "full": full}
