"""Jobs that change their plan on the way."""

import torch

import deepspeed_sdp
from deepspeed_sdp.plan import SubnetworkPlan
from tests.engine.cases import build_model, ds_config, face, run_steps


def start(sdp, ds, **model):
    engine, *_ = deepspeed_sdp.initialize(model=build_model(**model), config=ds_config(**ds), sdp_config=sdp)
    return engine


def train(stages, ds, sdp, family="llama", model=None, frozen=(), steps=2):
    """``stages``: what to re-partition to before each stretch of steps after the first."""
    engine = start(sdp, ds, family=family, model=model, frozen=frozen)
    results = []
    for number, change in enumerate([None, *stages]):
        before = engine.full_state_dict(torch.float32)
        if change is not None:
            repartition(engine, change)
        after = engine.full_state_dict(torch.float32)
        same = before is None or all(torch.equal(before[name], after[name]) for name in before)
        result = run_steps(engine, steps, seed=number + 1)
        results.append({**result, **face(engine), "same": same, "sdp": engine.sdp_config.written()})
    engine.destroy()
    return results


def repartition(engine, change):
    change = dict(change)
    round_ = change.pop("round", None)
    plan = None if round_ is None else engine.plan.resampled(*round_)
    if "plan_json" in change:
        plan = SubnetworkPlan.from_json(change.pop("plan_json"))
    engine.repartition(plan, change)
