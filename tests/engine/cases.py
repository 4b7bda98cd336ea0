"""What the ranks run. Every function is called on all ranks at once."""

import torch
import torch.distributed as dist

import deepspeed_sdp
from tests.support.models import tiny_model, token_batches


def ds_config(stage=1, *, bf16=False, clip=0.0, accumulation=1, bucket=500_000, lr=1e-3, optimizer=True, **extra):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        "steps_per_print": 10**9,
    }
    if optimizer:
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": lr, "weight_decay": 0.1, "eps": 1e-6, "torch_adam": True},
        }
    if bf16:
        config["bf16"] = {"enabled": True}
    return {**config, **extra}


def train(model=None, sdp=None, ds=None, steps=5, seed=1, meta=False, family="llama", full=True):
    """Train a tiny model for ``steps``; losses, norms, full weights (rank 0), and this rank's weights."""
    ds = ds_config(**(ds or {}))
    module = tiny_model(family, meta=meta, **(model or {}))
    engine, *_ = deepspeed_sdp.initialize(model=module, config=ds, sdp_config=sdp or {})
    result = run_steps(engine, steps, seed)
    result["plan"] = engine.plan.to_json()
    result["owned"] = {
        name: (engine._subnetwork.fragments[name], p.detach().float().clone())
        for name, p in engine.module.named_parameters()
    }
    result["full"] = engine.full_state_dict(torch.float32) if full else None
    result["stats"] = engine.sdp_stats()
    engine.destroy()
    return result


def run_steps(engine, steps, seed=1):
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = engine.gradient_accumulation_steps()
    losses, norms = [], []
    for step in token_batches(steps, world, micro, seed=seed):
        loss_sum = 0.0
        for ids in step[rank]:
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            loss_sum += float(loss.detach()) / micro
        losses.append(loss_sum)
        norms.append(float(engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms}
