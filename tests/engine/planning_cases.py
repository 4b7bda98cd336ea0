"""Where the plan of a job is made."""

import importlib

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config


def planned():
    """How often this rank planned in a call of initialize, and the hash of its plan."""
    # The package's attribute of this name is the function.
    module = importlib.import_module("deepspeed_sdp.engine.initialize")
    original, calls = module.plan_for, []
    module.plan_for = lambda *arguments: calls.append(1) or original(*arguments)
    try:
        engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(), sdp_config={"coverage": 0.5})
    finally:
        module.plan_for = original
    plan = engine.plan
    engine.destroy()
    return len(calls), plan.hash
