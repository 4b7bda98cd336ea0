"""A user's collectives beside the engine's, and what is left of an engine that was destroyed."""

import pytest
import torch
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.errors import StateError
from deepspeed_sdp.ranks import control_group
from tests.engine.cases import build_model, ds_config, owned_weights, run_steps
from tests.engine.error_cases import differing
from tests.support.models import token_batches


def user_collectives_in_backward(stage, sdp, with_user):
    """Losses, weights, and what a user's all-reduces on the default group gave inside of backward passes.

    On half of the ranks they are issued before the engine sees the gradient, on the others after.
    """
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(stage, bucket=1), sdp_config=sdp)
    sums, works = [], []

    def count(_):
        sums.append(torch.tensor(float(dist.get_rank())))
        works.append(dist.all_reduce(sums[-1], async_op=True))

    # Every rank owns the norms and the embeddings, so all call equally often.
    for name, parameter in engine.module.named_parameters():
        if with_user and ("norm" in name or "embed" in name or "lm_head" in name):
            is_before = dist.get_rank() % 2 == 0
            (parameter.register_hook if is_before else parameter.register_post_accumulate_grad_hook)(count)
    result = run_steps(engine, 2)
    result["weights"] = owned_weights(engine)
    engine.destroy()
    for work in works:
        work.wait()
    return {**result, "sums": [float(total) for total in sums]}


def refused(name):
    """Process groups after one refused ``initialize``, and after another."""
    counts = []
    for _ in range(2):
        if name == "deepspeed's own config":  # before there is an engine
            config = ds_config(bucket="large")
            with pytest.raises(ValueError, match="reduce_bucket_size"):
                deepspeed_sdp.initialize(model=build_model(), config=config, sdp_config={"coverage": 0.5})
        else:
            differing(name=name, rank=2)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def _hooks(module):
    """Number of hooks on every module and parameter."""
    counted = {
        f"{name}.{kind}": len(getattr(child, kind))
        for name, child in module.named_modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_backward_hooks")
    }
    for name, parameter in module.named_parameters():
        counted[name] = len(parameter._post_accumulate_grad_hooks or ()) + len(parameter._backward_hooks or ())
    return counted


def destroyed(stage, sdp):
    """What a destroyed engine answers to each call, and what is left on its model and in torch."""
    before = len(dist.distributed_c10d._world.pg_map)
    control_group()
    groups = len(dist.distributed_c10d._world.pg_map)
    model = build_model()
    engine, *_ = deepspeed_sdp.initialize(model=model, config=ds_config(stage, bucket=4000), sdp_config=sdp)
    run_steps(engine, 1)
    ids = token_batches(1, 1)[0][0][0]
    batch = {"input_ids": ids, "labels": ids}
    loss = engine(**batch).loss
    pending = engine.optimizer
    engine.destroy()
    engine.destroy()
    answers = {}
    for name, call in {
        "forward": lambda: engine(**batch),
        "backward": lambda: engine.backward(loss),
        "step": lambda: engine.step(),
        "save_checkpoint": lambda: engine.save_checkpoint("/nonexistent"),
        "load_checkpoint": lambda: engine.load_checkpoint("/nonexistent"),
        "evaluate_full": lambda: engine.evaluate_full([batch]),
        "calibrate": lambda: engine.calibrate([batch]),
        "full_model": lambda: engine.full_model().__enter__(),
        "full_state_dict": lambda: engine.full_state_dict(),
        "save_hf": lambda: engine.save_hf("/nonexistent"),
        "gathered_weights": lambda: engine.gathered_weights(0).__enter__(),
        "sdp_stats": lambda: engine.sdp_stats(),
        "the optimizer's step": lambda: pending.step(),
        "the optimizer's group": lambda: pending.dp_process_group,
    }.items():
        try:
            call()
            answers[name] = "done"
        except StateError as error:
            answers[name] = str(error)
    # One rank alone: whatever waited for others would wait for ever.
    alone = None
    if dist.get_rank() == 0:
        try:
            model(**batch).loss.backward()
            alone = "done"
        except StateError as error:
            alone = str(error)
    left = {name: count for name, count in _hooks(model).items() if count}
    second, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(stage), sdp_config=sdp)
    losses = run_steps(second, 2)["losses"]
    second.destroy()
    return {
        "answers": answers,
        "alone": alone,
        "hooks": left,
        "groups": (before, groups, len(dist.distributed_c10d._world.pg_map)),
        "losses": losses,
    }
