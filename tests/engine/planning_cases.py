"""Where the plan of a job is made, and what ranks tell each other at start."""

import importlib

import torch.distributed as dist

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config


def planned(masking):
    """How often this rank planned in a call of initialize and gathered all ranks' objects, and its plan's hash."""
    # The package's attribute of this name is the function.
    module = importlib.import_module("deepspeed_sdp.engine.initialize")
    originals, calls, gathers = (module.plan_for, dist.all_gather_object), [], []
    module.plan_for = lambda *arguments: calls.append(1) or originals[0](*arguments)
    dist.all_gather_object = lambda *arguments, **keys: gathers.append(1) or originals[1](*arguments, **keys)
    try:
        engine, *_ = deepspeed_sdp.initialize(
            model=build_model(), config=ds_config(), sdp_config={"coverage": 0.5, "masking": masking}
        )
    finally:
        module.plan_for, dist.all_gather_object = originals
    plan = engine.plan
    engine.destroy()
    return len(calls), len(gathers), plan.hash
