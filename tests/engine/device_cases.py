"""What the ranks run to show how a device would be used."""

import os
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, run_steps
from tests.support.recording import recorded


def build(ds, sdp, meta=False):
    engine, *_ = deepspeed_sdp.initialize(model=build_model(meta=meta), config=ds_config(**ds), sdp_config=sdp)
    return engine


def calls_of_initialize(sdp, meta=False):
    """The local rank, the plan, and what is called before the engine is there."""
    with recorded() as (log, _):
        engine = build({"stage": 1}, sdp, meta)
        plan = engine.plan.to_json()
        engine.destroy()
    return int(os.environ["LOCAL_RANK"]), plan, [call for call in log if call[0] != "record"]


def calls_of_steps(ds, sdp, steps=3):
    """Of each step: the calls, and the seconds that the engine gives after it. And memory freed while it was used."""
    freed_in_use = []
    resize = torch.UntypedStorage.resize_

    with recorded() as (log, busy):
        engine = build(ds, sdp)

        def watch(storage, size):
            if size == 0 and any(work.holds(storage) for work in busy):
                freed_in_use.append(storage.nbytes())
            return resize(storage, size)

        of_steps = []
        with mock.patch.object(torch.UntypedStorage, "resize_", watch):
            for step in range(steps):
                first = len(log)
                run_steps(engine, 1, seed=step)
                of_steps.append((log[first:], engine.sdp_stats()["seconds"]))
        waiting = len(busy)
        engine.destroy()
    return of_steps, freed_in_use, waiting


def traced_names(ds, sdp):
    """Names of this package in a profiler's trace of one step."""
    engine = build(ds, sdp)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run_steps(engine, 1)
    engine.destroy()
    return sorted({event.key for event in trace.key_averages() if event.key.startswith("deepspeed_sdp::")})
