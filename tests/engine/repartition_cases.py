"""Jobs that change their plan on the way."""

import gc
import threading
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import deepspeed_sdp
from deepspeed_sdp.engine.state import moving
from deepspeed_sdp.engine.state import repartition as repartition_module
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


def round_trip(ds, sdp, change, model=None):
    """Train, go to another plan and back, train on; and the same without."""
    results = []
    for goes in (True, False):
        engine = start(sdp, ds, model=model)
        run_steps(engine, 2)
        if goes:
            plan, block = engine.plan, {key: getattr(engine.sdp_config, key) for key in change if key != "round"}
            repartition(engine, change)
            engine.repartition(plan, block)
        results.append({**run_steps(engine, 2, seed=3), "full": engine.full_state_dict(torch.float32)})
        engine.destroy()
    return results


def many(times, stage, sdp, changes):
    """What there is after a few re-partitions, and after many."""
    engine = start(sdp, {"stage": stage, "bucket": 4000})
    found = []
    run_steps(engine, 1)
    for number in range(times):
        repartition(engine, changes[number % len(changes)])
        if number in (2 * len(changes) - 1, times - 1):
            run_steps(engine, 1)
            gc.collect()
            module = engine.module
            found.append({
                "groups": len(dist.distributed_c10d._world.pg_map),
                "tensors": sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor)),
                "modules": sum(1 for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)),
                "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()),
                "threads": threading.active_count(),
            })  # fmt: skip
    engine.destroy()
    return found


def one_of_many_things(sdp, ds, change, client=None):
    """Bytes, peak and what a client has put on the model, across one re-partition."""
    engine = start(sdp, ds)
    seen = []
    handle = engine.module.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    run_steps(engine, 2)
    root, optimizer, groups = engine.module, engine.optimizer, engine.optimizer.param_groups
    lr = [group["lr"] for group in groups]
    repartition(engine, change)
    assert engine.module is root
    assert engine.optimizer is optimizer
    assert all(one is other for one, other in zip(engine.optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in groups] == lr
    assert engine.global_steps == 2
    assert len(seen) == 2
    run_steps(engine, 1)
    assert len(seen) == 3
    sent = engine.sdp_stats()["bytes_sent_by_kind"]["repartition"]
    handle.remove()
    run_steps(engine, 1)
    assert len(seen) == 3
    engine.destroy()
    return sent


def refused(sdp, ds, changes):
    """The words of each refusal; training goes on as if nothing had been."""
    engine = start(sdp, ds)
    run_steps(engine, 1)
    said = []
    for change in changes:
        try:
            repartition(engine, change)
        except deepspeed_sdp.SDPError as error:
            said.append(f"{type(error).__name__}: {error}")
    ids = torch.zeros(2, 12, dtype=torch.int64)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    try:
        engine.repartition(engine.plan.resampled(1))
    except deepspeed_sdp.SDPError as error:
        said.append(f"{type(error).__name__}: {error}")
    engine.step()
    run_steps(engine, 1)
    engine.destroy()
    return said


def scheduled(ds, sdp, folder, save_at, steps):
    """Train by a schedule; then from a checkpoint of step ``save_at``."""
    engine = start(sdp, ds)
    plans, results = [], [run_steps(engine, save_at)]
    engine.save_checkpoint(folder)
    for step in range(save_at, steps):
        plans.append(engine.plan.hash)
        results.append(run_steps(engine, 1, seed=100 + step))
    found = {"whole": results[save_at - steps :], "plans": plans, "full": engine.full_state_dict(torch.float32)}
    engine.destroy()
    engine = start(sdp, ds)
    engine.load_checkpoint(folder)
    plan = engine.plan.hash
    went_on = [run_steps(engine, 1, seed=100 + step) for step in range(save_at, steps)]
    found["again"] = {"went_on": went_on, "first": plan, "full": engine.full_state_dict(torch.float32)}
    engine.destroy()
    return found


def by_schedule(ds, sdp, steps):
    """One step at a time, with the plan of each."""
    engine = start(sdp, ds)
    results = []
    for step in range(steps):
        plan = {"plan": engine.plan.to_json(), "workers": list(engine._owner_groups.workers)}
        results.append({**run_steps(engine, 1, seed=step + 1), **plan, "sdp": engine.sdp_config.written()})
    results[-1]["full"] = engine.full_state_dict(torch.float32)
    engine.destroy()
    return results


def live_bytes():
    storages = {}
    for value in gc.get_objects():
        # Others hold no memory of their own, as those that a compiler left.
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak(stage, sdp, change):
    """Bytes of all tensors before, at every portion on its way, and after."""
    model = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6}
    engine = start(sdp, {"stage": stage, "bucket": 20000}, model=model)
    run_steps(engine, 1)
    gc.collect()
    seen = [live_bytes()]
    exchange = moving._exchange

    def watched(*args):
        seen.append(live_bytes())
        exchange(*args)

    put_in = repartition_module._put_in

    def watched_end(*args):
        seen.append(live_bytes())
        put_in(*args)

    with mock.patch.object(moving, "_exchange", watched), mock.patch.object(repartition_module, "_put_in", watched_end):
        repartition(engine, change)
    run_steps(engine, 1)
    gc.collect()
    after = live_bytes()
    engine.destroy()
    return {"before": seen[0], "peak": max(seen[1:]), "after": after}


def with_client(stage, change, offload=False):
    """A client's optimizer of two groups and a scheduler, across a re-partition."""
    model = build_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}], eps=1e-5
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = ds_config(stage, optimizer=False, bucket=4000, zero_allow_untested_optimizer=True)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed_sdp.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, sdp_config={"coverage": 0.5}
    )
    results = [{**run_steps(engine, 2, seed=1), **face(engine)}]
    repartition(engine, change)
    results.append({**run_steps(engine, 2, seed=2), **face(engine), "rates": engine.get_lr()})
    engine.destroy()
    return results


def scaled(sdp, ds, changes):
    """Largest change of the full model, and its scale, where there is one."""
    engine = start(sdp, ds)
    run_steps(engine, 2)
    engine.full_scale = 1.25
    before = engine.full_state_dict(torch.float32)
    found = []
    for change in changes:
        repartition(engine, change)
        after = engine.full_state_dict(torch.float32)
        differs = 0.0 if before is None else max(float((after[n] - before[n]).abs().max()) for n in before)
        found.append((differs, engine.full_scale))
    run_steps(engine, 1)
    engine.destroy()
    return found


def frozen_in_between(sdp, ds, change, pattern="layers.1."):
    """The full model after steps with a part of it frozen across a re-partition, and after it is trained again."""

    def freeze(is_frozen):
        for name, parameter in engine.module.named_parameters():
            if pattern in name and name not in engine._subnetwork.frozen:
                parameter.requires_grad_(not is_frozen)

    engine = start(sdp, ds)
    run_steps(engine, 2)
    freeze(True)
    snapshots = [engine.full_state_dict(torch.float32)]
    repartition(engine, change)
    run_steps(engine, 1, seed=2)
    snapshots.append(engine.full_state_dict(torch.float32))
    freeze(False)
    run_steps(engine, 1, seed=3)
    snapshots.append(engine.full_state_dict(torch.float32))
    engine.destroy()
    return snapshots


def without_memory(sdp, ds, bytes_left):
    """The words with which a job is refused that would not fit later, and that a call is."""
    said = []
    with mock.patch.object(type(get_accelerator()), "available_memory", return_value=bytes_left):
        for schedule in (sdp["schedule"], {}):
            try:
                engine = start({**sdp, "schedule": schedule}, ds)
                run_steps(engine, 1)
                before = engine.plan.hash
                repartition(engine, {"coverage": 1.0})
            except deepspeed_sdp.SDPError as error:
                said.append(f"{type(error).__name__}: {error}")
        assert engine.plan.hash == before
        run_steps(engine, 1)
        engine.destroy()
    return said
