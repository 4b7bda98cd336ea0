"""Workers that train apart, and agree every few steps: beside the simulation."""

import random

import pytest
import torch

from deepspeed_sdp.plan import SubnetworkPlan
from tests.engine.cases import build_model
from tests.engine.test_no_hang import random_case
from tests.support import oracle
from tests.support.compare import SCALES, _share, adamw, assert_same_weights
from tests.support.models import token_batches

CASES = "tests.engine.local_steps_cases"
NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def simulated(result, sdp, ds, steps, make=adamw, model=None, family="llama", world=4):
    module = build_model(family, model).double()
    plan = SubnetworkPlan.from_json(result["plan"])
    batches = [token_batches(1, world, ds.get("accumulation", 1), seed=100 + step)[0] for step in range(steps)]
    masking = sdp.get("masking", "forward")
    power = SCALES["none" if masking == "backward" else "inverse_sqrt_coverage"]
    losses, norms = oracle.train_apart(
        module,
        oracle.unit_owners_of(plan, blocks=sdp.get("granularity", "neuron") != "neuron"),
        plan.num_subnetworks,
        batches,
        make,
        sdp["schedule"].get("sync_interval", 1),
        sdp["schedule"].get("outer_optimizer"),
        clip=ds.get("clip", 0.0),
        scale=lambda worker, name: _share(plan, worker, name) ** -power,
        workers=result["workers"],
        masking=masking,
        delay=sdp["schedule"].get("sync_delay", 0),
        with_moments=sdp["schedule"].get("moments_sync", False),
    )
    return module, losses, norms


def check(results, sdp, ds, steps, tolerance=1e-5, **job):
    module, losses, norms = simulated(results[0], sdp, ds, steps, **job)
    for rank, result in enumerate(results):
        worker = result["workers"][rank]
        assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=tolerance)
        assert result["norms"] == pytest.approx([step[worker] for step in norms], rel=10 * tolerance)
    assert_same_weights(results[0]["full"], module.state_dict(), tolerance)


def apart(interval=3, outer=None, delay=0, moments_sync=False, **sdp):
    schedule = {"sync_interval": interval, "sync_delay": delay, "moments_sync": moments_sync}
    schedule |= {} if outer is None else {"outer_optimizer": outer}
    return {"coverage": 0.5, **sdp, "schedule": schedule}


JOBS = {
    "forward": (apart(), {"stage": 0}),
    "forward, outer": (apart(outer=NESTEROV), {"stage": 0, "clip": 0.5}),
    "every step, outer": (apart(1, {"lr": 0.5, "momentum": 0.5, "nesterov": False}), {"stage": 0}),
    "one owner": (apart(coverage=0.25), {"stage": 0, "accumulation": 2}),
    "one owner, outer": (apart(coverage=0.25, outer=NESTEROV), {"stage": 0}),
    "blocks": (apart(granularity="layer"), {"stage": 0, "clip": 0.5}),
    "moments": (apart(2, moments_sync=True), {"stage": 0}),
    "moments, outer, replicas": (
        apart(3, NESTEROV, moments_sync=True, num_subnetworks=2, coverage=1.0),
        {"stage": 2},
    ),
    "moments, backward": (apart(3, moments_sync=True, masking="backward"), {"stage": 0}),
    "delay": (apart(3, delay=1), {"stage": 0, "clip": 0.5}),
    "delay, outer": (apart(3, NESTEROV, delay=2), {"stage": 0}),
    "delay, replicas": (apart(2, NESTEROV, delay=1, num_subnetworks=2, coverage=1.0), {"stage": 1}),
    "delay, replicas, whole": (apart(2, delay=1, num_subnetworks=2, coverage=1.0), {"stage": 0}),
    "backward": (apart(masking="backward"), {"stage": 0}),
    "backward, outer": (apart(masking="backward", outer=NESTEROV), {"stage": 0, "accumulation": 2}),
    "dense, outer": (apart(coverage=1.0, outer=NESTEROV), {"stage": 0}),
    "replicas": (apart(num_subnetworks=2, coverage=1.0, outer=NESTEROV), {"stage": 1, "clip": 0.5}),
    "replicas, whole": (apart(num_subnetworks=2, coverage=1.0), {"stage": 0}),
    "replicas, one owner": (apart(num_subnetworks=2), {"stage": 2, "accumulation": 2}),
    "replicas, one owner, whole": (apart(num_subnetworks=2, outer=NESTEROV), {"stage": 0}),
    "replicas, backward": (apart(num_subnetworks=2, masking="backward"), {"stage": 1}),
    "replicas, backward, whole": (apart(num_subnetworks=2, masking="backward", outer=NESTEROV), {"stage": 0}),
}


@pytest.mark.parametrize("job", JOBS)
def test_adamw(ranks4, job):
    sdp, ds = JOBS[job]
    ds = {"bucket": 4000, **ds}
    # Three rounds, and the beginning of a fourth.
    check(ranks4.run(f"{CASES}:train", ds=ds, sdp=sdp, steps=10), sdp, ds, 10)


@pytest.mark.parametrize("job", ["forward, outer", "backward, outer", "replicas"])
def test_sgd(ranks4, job):
    sdp, ds = JOBS[job]
    ds = {**ds, "zero_allow_untested_optimizer": True}
    check(ranks4.run(f"{CASES}:train", ds=ds, sdp=sdp, steps=9, optimizer=SGD), sdp, ds, 9, 1e-6, make=sgd)


def random_job(seed):
    world, values = random_case(seed)
    draw, sdp, ds = random.Random(seed), values["sdp"], values["ds"]
    del sdp["comm"]
    has_replicas = "num_subnetworks" in sdp
    ds |= {"stage": draw.choice([0, 1, 2]) if has_replicas else 0, "clip": draw.choice([0.0, 0.5])}
    sdp["masking"] = draw.choice(["forward", "forward", "backward"])
    interval = draw.choice([1, 2, 3])
    sdp["schedule"] = {"sync_interval": interval, "outer_optimizer": NESTEROV}
    if interval > 1 and draw.random() < 0.5:
        del sdp["schedule"]["outer_optimizer"]
    if sdp["masking"] == "forward":
        sdp["schedule"]["sync_delay"] = draw.randrange(interval)
    return world, sdp, ds, {"model": values["model"], "sleep": seed}


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 80))])
def test_random_jobs_with_random_delays(pools, seed):
    world, sdp, ds, job = random_job(seed)
    results = pools(world).run(f"{CASES}:train", timeout=120, ds=ds, sdp=sdp, steps=5, **job)
    check(results, sdp, ds, 5, model=job["model"], world=world)


@pytest.mark.parametrize("job", ["forward", "forward, outer", "backward", "replicas", "replicas, whole"])
def test_bytes_of_a_round(ranks4, job):
    """Owners average ``4 * n`` bytes of weights once a round, and outside of that workers send each other nothing."""
    sdp, ds = JOBS[job]
    for result in ranks4.run(f"{CASES}:train", ds=ds, sdp=sdp, steps=6):
        replicas = 4 // SubnetworkPlan.from_json(result["plan"]).num_subnetworks
        n = {
            k: sum(shards) for k, shards in result["shards"].items() if k > 1 or sdp["schedule"].get("outer_optimizer")
        }
        among = replicas if ds["stage"] == 0 else 1
        expected = 0.0
        for k, numel in n.items():
            # Scattered and gathered: inside, where replicas hold the same, then a slice of it outside.
            if k > 1:
                expected += 2 * 4 * (numel * (among - 1) / among + numel / among * (k - 1) / k)
        for step, sent in enumerate(result["bytes"], 1):
            assert sent.get("outer_average", 0) == (pytest.approx(expected, rel=0.01) if step % 3 == 0 else 0)
            if replicas == 1 and step % 3:
                assert not sum(sent.values()), sent


@pytest.mark.parametrize(
    ("job", "changes"),
    [
        ("forward", {}),
        ("forward, outer", {"checkpoint": {"async": True}}),
        ("backward, outer", {"checkpoint": {"copies": 2}}),
        ("replicas", {}),
        ("delay, outer", {}),
        ("delay, replicas", {}),
    ],
)
@pytest.mark.parametrize("save_at", [3, 5])
def test_a_job_resumes_in_the_middle_of_a_round(ranks4, tmp_path, job, changes, save_at):
    sdp, ds = JOBS[job]
    ds = {**ds, "bf16": save_at == 5 and job == "replicas"}
    results = ranks4.run(
        f"{CASES}:resumed", ds=ds, sdp={**sdp, **changes}, folder=str(tmp_path), save_at=save_at, steps=5
    )
    for result in results:
        assert result["again"] == result["whole"]
    expected, found = results[0]["expected"], results[0]["found"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("job", ["forward, outer", "replicas", "backward"])
def test_any_layout_takes_what_owners_would_agree_on(ranks4, tmp_path, job):
    sdp, ds = JOBS[job]
    full = ranks4.run(f"{CASES}:saved", ds=ds, sdp=sdp, folder=str(tmp_path), steps=5)[0]
    others = [
        ({"coverage": 0.5}, {"stage": 3}),
        (apart(2, coverage=0.75), {"stage": 0}),
        (apart(5, outer=NESTEROV, num_subnetworks=2, coverage=1.0), {"stage": 2}),
        ({"coverage": 0.5, "masking": "backward"}, {"stage": 1}),
    ]
    for other, at in others:
        loaded = ranks4.run(f"{CASES}:loaded", ds=at, sdp=other, folder=str(tmp_path))[0]
        assert_same_weights(loaded["full"], full, 1e-7)


def test_one_step_apart_is_every_step_together(ranks4):
    """Without an outer optimizer an interval of 1 is no local step at all."""
    ds = {"stage": 1, "clip": 0.5}
    runs = [
        ranks4.run(f"{CASES}:train", ds=ds, sdp={"coverage": 0.5, **more}, steps=3)
        for more in ({}, {"schedule": {"sync_interval": 1}})
    ]
    for one, other in zip(*runs, strict=True):
        assert (one["losses"], one["norms"], one["bytes"]) == (other["losses"], other["norms"], other["bytes"])
    assert all(torch.equal(runs[0][0]["full"][name], value) for name, value in runs[1][0]["full"].items())


@pytest.mark.parametrize(
    ("sdp", "ds", "changes", "steps"),
    [
        (apart(2, coverage=0.25), {"stage": 0}, [{"round": (1, "random")}, {"round": (2, "random")}], 2),
        (apart(3), {"stage": 0}, [{"sdp": {"coverage": 0.75}}, {"sdp": {"masking": "backward"}}], 4),
        (
            apart(3, num_subnetworks=2, coverage=1.0), {"stage": 1},
            [{"sdp": {"coverage": 0.5}}, {"sdp": {"schedule": {"sync_interval": 1}}}], 4,
        ),
    ],
)  # fmt: skip
def test_other_plans_begin_with_what_owners_agree_on(ranks4, sdp, ds, changes, steps):
    results = ranks4.run(f"{CASES}:repartitioned", ds=ds, sdp=sdp, changes=changes, steps=steps)
    for of_rank in results:
        assert all(stretch["same"] for stretch in of_rank)
        assert [stretch["at"] for stretch in of_rank] == [steps * (number + 1) for number in range(len(changes) + 1)]
    losses = [sum(of_rank[number]["losses"][-1] for of_rank in results) for number in range(len(changes) + 1)]
    assert all(loss == loss for loss in losses)


def test_independent_subnetwork_training(ranks4):
    """One owner per unit, local steps, other units after every round: beside the simulation, moments begun anew."""
    sdp = apart(2, coverage=0.25)
    sdp["schedule"] |= {"resample_interval": 2, "resample": "random", "moments": "reset"}
    results = ranks4.run(f"{CASES}:train", ds={"stage": 0}, sdp=sdp, steps=4)
    first = SubnetworkPlan.from_json(results[0]["plan"])
    # The plan in the end is that of round 2.
    plans = [ranks4.run(f"{CASES}:plan_of", sdp=sdp, round_=number)[0] for number in range(3)]
    assert SubnetworkPlan.from_json(plans[2]).hash == first.hash
    module, losses = build_model().double(), []
    for number in range(2):
        plan = SubnetworkPlan.from_json(plans[number])
        found, _ = oracle.train_apart(
            module, oracle.unit_owners_of(plan), 4,
            [token_batches(1, 4, 1, seed=100 + step)[0] for step in (2 * number, 2 * number + 1)],
            adamw, 2, scale=2.0, workers=results[0]["workers"],
        )  # fmt: skip
        losses += found
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=1e-5)
    assert_same_weights(results[0]["full"], module.state_dict(), 1e-5)


@pytest.mark.parametrize("ds", [{"stage": 0, "bf16": True}, {"stage": 0, "offload": True}])
def test_low_precision_and_offloading_follow(ranks4, ds):
    ds = dict(ds)
    is_bf16 = ds.get("bf16", False)
    if ds.pop("offload", False):
        ds = {
            "stage": 1,
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": False,
        }
        sdp = apart(num_subnetworks=2, coverage=1.0, outer=NESTEROV)
    else:
        sdp = apart(outer=NESTEROV)
    results = ranks4.run(f"{CASES}:train", ds=ds, sdp=sdp, steps=6)
    if is_bf16:
        module, losses, _ = simulated(results[0], sdp, ds, 6)
        assert results[0]["losses"] == pytest.approx([step[0] for step in losses], abs=0.03)
        assert_same_weights(results[0]["full"], module.state_dict(), 0.02)
    else:
        check(results, sdp, ds, 6)


REFUSED = [
    ({"stage": 3}, apart(), "zero_optimization.stage: got 3 with local steps"),
    ({"stage": 1}, apart(outer=NESTEROV, interval=1), "zero_optimization.stage: got 1 with local steps"),
    ({"stage": 0, "fp16": {"enabled": True}}, apart(), "fp16.enabled: got true with local steps"),
    ({"stage": 0}, apart(comm={"consistency_check_interval": 3}), "consistency_check_interval: got 3 with local steps"),
    (
        {"stage": 0},
        apart(masking="backward", backward={"overlap_refresh": True}),
        "overlap_refresh: got true with local",
    ),
    ({"stage": 1}, apart(comm={"transport": "all_to_all"}), 'comm.transport: got "all_to_all" with local steps'),
    ({"stage": 0}, apart(0), "sync_interval: got 0"),
    ({"stage": 0}, apart(2, delay=1, masking="backward"), "sync_delay: got 1 with masking"),
    ({"stage": 0}, apart(1, moments_sync=True), "moments_sync: got true with sync_interval 1"),
    ({"stage": 0}, apart(2, delay=2), "sync_delay: got 2 with sync_interval 2"),
    ({"stage": 0}, apart(outer={"lr": -1.0}), "outer_optimizer.lr: got -1.0"),
    ({"stage": 0}, apart(outer={"rate": 1.0}), "outer_optimizer.rate: unknown key"),
]


@pytest.mark.parametrize(("ds", "sdp", "message"), REFUSED)
def test_refusals(ranks4, ds, sdp, message):
    for said in ranks4.run(f"{CASES}:refusal", ds=ds, sdp=sdp):
        assert message in said


def test_one_worker_s_nan_is_its_own(ranks4):
    """It passes over that step; the others go on, and at the end of the round it agrees with them."""
    for rank, (skipped, losses) in enumerate(ranks4.run(f"{CASES}:nan_on_one", sdp=apart(), bad_rank=1)):
        assert skipped == int(rank == 1)
        assert all(loss == loss for loss in losses[2:])


def test_a_worker_that_passes_over_every_step_keeps_up_with_the_others(ranks4):
    """It has no moments to average, and the others wait for as many of them."""
    sdp = apart(2, moments_sync=True)
    for rank, (skipped, losses) in enumerate(ranks4.run(f"{CASES}:nan_always", timeout=90, sdp=sdp, bad_rank=1)):
        assert skipped == 4 * (rank == 1)
        assert all(loss == loss for loss in losses)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (apart(3, delay=2), apart(3, delay=1)),
        (apart(3), apart(3, NESTEROV)),
        (apart(3, NESTEROV, delay=1), apart(2)),
        (apart(3, NESTEROV), {"coverage": 0.5}),
    ],
)
def test_a_job_goes_on_with_another_schedule(ranks4, tmp_path, before, after):
    """In the middle of a round, with an agreement under way: nothing of it is lost, or left half done."""
    full = ranks4.run(f"{CASES}:saved", ds={"stage": 0}, sdp=before, folder=str(tmp_path), steps=4)[0]
    loaded = ranks4.run(f"{CASES}:loaded", ds={"stage": 0}, sdp=after, folder=str(tmp_path), timeout=90)
    assert_same_weights(loaded[0]["full"], full, 1e-6)
    assert all(loss == loss for result in loaded for loss in result["losses"])
