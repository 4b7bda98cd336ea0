"""Backward masking: gradients, forward passes, FLOPs and bytes of one step."""

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import deepspeed_sdp
from deepspeed_sdp.engine.deepspeed.memory import gradient_peak
from tests.engine.cases import build_model, ds_config, face, run_steps
from tests.engine.stats_cases import buckets, watched
from tests.support.models import token_batches


def gradient(rotation, sdp, stage, **values):
    """The averaged gradient of the full model (rank 0), where rank ``r`` has the batch of rank ``r + rotation``."""
    module = build_model(**values)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    config = ds_config(stage, bucket=4000, optimizer=False, zero_allow_untested_optimizer=True)
    engine, *_ = deepspeed_sdp.initialize(model=module, optimizer=optimizer, config=config, sdp_config=sdp)
    before = engine.full_state_dict()
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = token_batches(1, world)[0][(rank + rotation) % world][0]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    after = engine.full_state_dict()
    engine.destroy()
    return None if before is None else {name: before[name] - after[name] for name in before}


def forward_bits(sdp, steps=2, **values):
    """Logits of this rank for one common batch after some steps, in training mode, and the full model's weights."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(**values), config=ds_config(2), sdp_config=sdp)
    run_steps(engine, steps)
    ids = token_batches(1, 1)[0][0][0]
    logits = engine(input_ids=ids, labels=ids).logits.detach().clone()
    result = {"logits": logits, "ids": ids, "full": engine.full_state_dict()}
    engine.destroy()
    return result


def costs(sdp, ds, model=None):
    """FLOPs, bytes and traffic of one step on this rank."""
    module = build_model(model=model)
    engine, *_ = deepspeed_sdp.initialize(model=module, config=ds_config(**ds), sdp_config=sdp)
    run_steps(engine, 1)
    with watched() as seen, gradient_peak(engine) as peak, FlopCounterMode(display=False) as counter:
        run_steps(engine, 1)
        engine.optimizer.refresh.settle()
    result = {
        "seen": seen,
        "buckets": buckets(engine),
        "gradient_peak": peak.nbytes,
        "flops": counter.get_total_flops(),
        **face(engine),
    }
    engine.destroy()
    return result


def state_dict(sdp):
    """What ``state_dict`` gives right after a step, and the weights once everything has arrived."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(1, bucket=4000), sdp_config=sdp)
    run_steps(engine, 2)
    assert engine.optimizer.refresh.in_flight_bytes > 0, "the test needs weights under way"
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.optimizer.refresh.settle()
    full = {name: engine.module.get_parameter(name).detach().clone() for name in engine._subnetwork.full_order}
    engine.destroy()
    return state, full
