"""Jobs whose workers train apart between synchronisations."""

import torch

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, face, run_steps, sleep_in_backward


def start(ds, sdp, model=None, optimizer=None, family="llama"):
    config = ds_config(**ds)
    if optimizer is not None:
        config["optimizer"] = optimizer
    engine, *_ = deepspeed_sdp.initialize(model=build_model(family, model), config=config, sdp_config=sdp)
    return engine


def train(ds, sdp, steps, model=None, optimizer=None, family="llama", sleep=None):
    """Losses, norms, bytes of every step, and the full model in the end, which may be in the middle of a round."""
    engine = start(ds, sdp, model, optimizer, family)
    if sleep is not None:
        sleep_in_backward(engine.module, sleep)
    result = {"losses": [], "norms": [], "bytes": []}
    for step in range(steps):
        one = run_steps(engine, 1, seed=100 + step)
        result["losses"] += one["losses"]
        result["norms"] += one["norms"]
        result["bytes"].append(engine.sdp_stats()["bytes_sent_by_kind"])
    seen = face(engine)
    again = engine.full_state_dict(torch.float32)
    if again is not None:
        assert all(torch.equal(again[name], value) for name, value in seen["full"].items()), "looking changes nothing"
    result["owned"] = {seen["owned"][name][0]: value for name, (_, value) in seen["owned"].items()}
    shards = {}
    for bucket in engine.optimizer.masters:
        shards.setdefault(len(bucket.owners.ranks) // bucket.owners.replicas, []).append(bucket.shard_numel)
    result["shards"] = shards
    engine.destroy()
    return {**result, "plan": seen["plan"], "workers": seen["workers"], "full": seen["full"]}


def resumed(ds, sdp, folder, save_at, steps):
    """Train on from a checkpoint, and without: what becomes of it."""
    engine = start(ds, sdp)
    run_steps(engine, save_at)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    whole = [run_steps(engine, 1, seed=50 + step) for step in range(steps)]
    expected = engine.full_state_dict(torch.float32)
    engine.destroy()
    engine = start(ds, sdp)
    engine.load_checkpoint(folder)
    again = [run_steps(engine, 1, seed=50 + step) for step in range(steps)]
    found = engine.full_state_dict(torch.float32)
    engine.destroy()
    return {"whole": whole, "again": again, "expected": expected, "found": found}


def loaded(ds, sdp, folder):
    """The full model of a checkpoint in another layout."""
    engine = start(ds, sdp)
    engine.load_checkpoint(folder)
    full = engine.full_state_dict(torch.float32)
    trained = run_steps(engine, 4, seed=9)
    engine.destroy()
    return {"full": full, **trained}


def saved(ds, sdp, folder, steps):
    engine = start(ds, sdp)
    run_steps(engine, steps)
    engine.save_checkpoint(folder)
    full = engine.full_state_dict(torch.float32)
    engine.destroy()
    return full


def repartitioned(ds, sdp, changes, steps):
    """Stretches of steps, before each of which but the first the subnetworks become others."""
    engine = start(ds, sdp)
    results = []
    for number, change in enumerate([None, *changes]):
        before = engine.full_state_dict(torch.float32)
        if change is not None:
            round_ = change.get("round")
            engine.repartition(engine.plan.resampled(*round_) if round_ else None, change.get("sdp"))
        after = engine.full_state_dict(torch.float32)
        result = run_steps(engine, steps, seed=number + 1)
        seen = face(engine)
        same = before is None or all(torch.allclose(before[n], after[n], atol=1e-7) for n in before)
        results.append({**result, "same": same, "sdp": engine.sdp_config.written(), "at": engine.global_steps,
                        **{key: seen[key] for key in ("plan", "workers", "full")}})  # fmt: skip
    engine.destroy()
    return results


def plan_of(sdp, round_):
    engine = start({"stage": 0}, {"coverage": sdp["coverage"]})
    plan = engine.plan.resampled(round_, sdp["schedule"]["resample"]).to_json()
    engine.destroy()
    return plan


def refusal(ds, sdp):
    try:
        start(ds, sdp).destroy()
    except deepspeed_sdp.SDPError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def nan_on_one(sdp, bad_rank):
    engine = start({"stage": 0}, sdp)
    losses = run_steps(engine, 1)["losses"]
    ids = torch.ones(2, 12, dtype=torch.int64)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss * float("nan") if torch.distributed.get_rank() == bad_rank else loss)
    engine.step()
    losses += [float("nan"), *run_steps(engine, 4, seed=3)["losses"]]
    skipped = engine.skipped_steps
    engine.destroy()
    return skipped, losses


def nan_always(sdp, bad_rank):
    """``bad_rank`` has no step that is finite; losses of all are."""
    engine, losses = start({"stage": 0}, sdp), []
    for _ in range(4):
        ids = torch.ones(2, 12, dtype=torch.int64)
        loss = engine(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        engine.backward(loss * float("nan") if torch.distributed.get_rank() == bad_rank else loss)
        engine.step()
    skipped = engine.skipped_steps
    engine.destroy()
    return skipped, losses
