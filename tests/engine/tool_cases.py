"""DeepSpeed's own tools on the parameters of an engine."""

import copy
import pickle
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
)

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, run_steps
from tests.support.models import token_batches


def start(stage, sdp, bf16=False, **extra):
    config = ds_config(stage, bf16=bf16, bucket=4000, **extra)
    return deepspeed_sdp.initialize(model=build_model(), config=config, sdp_config=sdp)[0]


def backward(engine, seed):
    ids = token_batches(1, dist.get_world_size(), seed=seed)[0][dist.get_rank()][0]
    engine.backward(engine(input_ids=ids, labels=ids).loss)


def trained(engine):
    """Parameters that this rank trains, by name, in the module's order: that of all owners."""
    found = dict(engine.module.named_parameters())
    return {name: p for name, p in found.items() if name not in engine._subnetwork.frozen}


def said(call):
    try:
        call()
    except deepspeed_sdp.SDPError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def values(engine, read, names=None):
    fragments = engine._subnetwork.fragments
    names = trained(engine) if names is None else names
    return {name: (fragments[name], read(p).detach().clone()) for name, p in trained(engine).items() if name in names}


def gathered(parameter):
    with GatheredParameters(parameter):
        return parameter.detach().clone()


def through_tools(cases):
    return [use(**case) for case in cases]


def use(stage, sdp, bf16):
    engine = start(stage, sdp, bf16)
    own = trained(engine)
    first = next(iter(own.values()))
    result = {"early": said(lambda: safe_get_full_optimizer_state(first, "exp_avg"))}
    backward(engine, 1)
    result["grads"] = values(engine, safe_get_full_grad)
    result["local"] = all(
        torch.equal(safe_get_local_grad(p), engine.optimizer.gradients.averages[b][low:high].float())
        for p in own.values()
        for b, low, high, _ in engine._parts.tools._of(p)[:1]
        if len(engine._parts.tools._of(p)) == 1
    )
    engine.step()
    result["norm"] = float(engine.get_global_grad_norm())
    result["late"] = said(lambda: safe_get_full_grad(first))
    result["weights"] = values(engine, safe_get_full_fp32_param)
    result["moments"] = values(engine, lambda p: safe_get_full_optimizer_state(p, "exp_avg"))
    result["gathered"] = values(engine, gathered)
    result["full"] = engine.full_state_dict(torch.float32)
    frozen = [p for name, p in engine.module.named_parameters() if name in engine._subnetwork.frozen]
    result["others"] = [safe_get_full_fp32_param(p) for p in frozen]

    # What is set is what is got, and what the next step takes.
    can_set = {n: p for n, p in own.items() if sdp["masking"] == "forward" or len(owners(engine, n)) == 4}
    refused = next((p for n, p in own.items() if n not in can_set), None)
    result["refused"] = None if refused is None else said(lambda: safe_set_full_fp32_param(refused, refused.data))
    result["size"] = said(lambda: safe_set_full_fp32_param(first, torch.zeros(3)))
    for p in can_set.values():
        safe_set_full_fp32_param(p, 1.5 * safe_get_full_fp32_param(p))
    result["set"] = values(engine, safe_get_full_fp32_param, can_set)
    result["set_weights"] = values(engine, gathered, can_set)
    if stage == 3:
        for p in can_set.values():
            safe_set_local_fp32_param(p, safe_get_local_fp32_param(p) / 1.5)
        result["set_back"] = values(engine, safe_get_full_fp32_param, can_set)
    for p in own.values():
        safe_set_full_optimizer_state(p, torch.full(p.shape, 2.0), "exp_avg")
    backward(engine, 2)
    safe_update_full_grad_vectorized(list(own.values()), lambda gradient, p: gradient * 0)
    safe_set_full_grad(first, torch.ones(first.shape))
    engine.step()
    result["moments_after"] = values(engine, lambda p: safe_get_full_optimizer_state(p, "exp_avg"))
    for p in own.values():
        local = torch.full((sum(h - low for _, low, h, _ in engine._parts.tools._of(p)),), 3.0)
        safe_set_local_optimizer_state(p, local, "exp_avg")
    result["moments_set"] = values(engine, lambda p: safe_get_full_optimizer_state(p, "exp_avg"))

    # One of the owners changes it for all of them.
    result["before_change"] = values(engine, safe_get_full_fp32_param, can_set)
    for name, p in can_set.items():
        with GatheredParameters([p], modifier_rank=owners(engine, name)[-1]):
            if dist.get_rank() == owners(engine, name)[-1]:
                with torch.no_grad():
                    p.view(-1)[::2].mul_(2)
    result["changed"] = values(engine, safe_get_full_fp32_param, can_set)
    result["changed_weights"] = values(engine, gathered, can_set)
    few = next((name for name in own if len(owners(engine, name)) < 4), None)
    if few is not None:
        other = next(rank for rank in range(4) if rank not in owners(engine, few))
        result["no owner"] = said(lambda: GatheredParameters(own[few], modifier_rank=other))
    result["after"] = run_steps(engine, 1)["losses"]
    result["state_dict"] = said(engine.module.state_dict)
    if stage < 3:
        held = engine.module.state_dict()
        result["state_dict_holds"] = all(torch.equal(held[name], p) for name, p in own.items())
        # A parameter that is pickled takes none of this with it.
        unpickled = {name: pickle.loads(pickle.dumps(p)) for name, p in own.items()}
        result["pickled"] = all(
            torch.equal(unpickled[name], p) and not vars(unpickled[name]) for name, p in own.items()
        )
    engine.destroy()
    result["left"] = sorted({name for p in own.values() for name in vars(p)})
    result["patched"] = GatheredParameters.__enter__.__module__
    return result


def owners(engine, name):
    return engine._parts.tools.owners(trained(engine)[name])


def resume(cases):
    """Losses after a state was kept, and after it was taken up again; the words for states of others."""
    results, foreign = [], {}
    for case in cases:
        engine = start(**case)
        run_steps(engine, 2)
        state = copy.deepcopy(engine.optimizer.state_dict())
        first = run_steps(engine, 2, seed=5)["losses"]
        engine.optimizer.load_state_dict(pickle.loads(pickle.dumps(state)))
        again = run_steps(engine, 2, seed=5)["losses"]
        engine.optimizer.load_state_dict(state)
        of_another_rank = {**state, "sdp_layout": {**state["sdp_layout"], "rank": 7}}
        words = [said(partial(engine.optimizer.load_state_dict, of)) for of in (foreign, of_another_rank)]
        foreign = state
        results.append({"first": first, "again": again, "words": words, "then": run_steps(engine, 2, seed=5)["losses"]})
        engine.destroy()
    return results
