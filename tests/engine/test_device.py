"""How a device is used, seen through an accelerator and works that write down what they are asked for."""

import os

import pytest
import torch
import torch.distributed as dist

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.deepspeed import start
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.estimate import Job
from deepspeed_sdp.estimate.buckets import Standing
from deepspeed_sdp.plan import SubnetworkPlan
from tests.support.recording import COLLECTIVES, WorkOfDevice, recorded

ROWS = [
    *(pytest.param({"stage": stage}, {"coverage": 0.5}, id=f"stage{stage}") for stage in (0, 1, 2, 3)),
    pytest.param({"stage": 1, "accumulation": 2}, {"coverage": 0.5, "masking": "backward"}, id="backward"),
    pytest.param(
        {"stage": 2},
        {
            "masking": "backward",
            "coverage": 0.5,
            "backward": {"overlap_refresh": True},
        },
        id="overlapped",
    ),
    pytest.param(
        {"stage": 3, "bucket": 4000},
        {"coverage": 0.5, "comm": {"transport": "owner_sets"}},
        id="stage3-owner_sets",
    ),
    pytest.param({"stage": 3}, {"num_subnetworks": 2, "coverage": 0.5}, id="stage3-replicas"),
]


@pytest.mark.parametrize("meta", [False, True])
def test_the_device_is_set_before_anything_is_sent(ranks4, meta):
    case = "tests.engine.device_cases:calls_of_initialize"
    for local_rank, _, calls in ranks4.run(case, timeout=60, sdp={"coverage": 0.5}, meta=meta):
        assert ("set_device", local_rank) in calls
        first = next(place for place, call in enumerate(calls) if call[0] in COLLECTIVES)
        assert calls.index(("set_device", local_rank)) < first


@pytest.mark.parametrize(
    "sdp", [{"coverage": 0.5}, {"num_subnetworks": 2, "coverage": 0.5}, {"coverage": 0.25}], ids=str
)
def test_the_estimate_counts_the_communicators(ranks4, sdp):
    results = ranks4.run("tests.engine.device_cases:calls_of_initialize", timeout=60, sdp=sdp)
    for rank, (_, plan, calls) in enumerate(results):
        plan = SubnetworkPlan.from_json(plan)
        groups = [call[1:] for call in calls if call[0] == "new_group" and rank in call[1] and len(call[1]) > 1]
        # On NCCL the package's own group for objects is gloo's.
        made = [ranks for ranks, backend in groups if backend != "gloo"]
        assert len(made) == Standing.of(plan, Job(4, 0, SDPConfig(**sdp)), 8, rank % plan.num_subnetworks).communicators


@pytest.mark.parametrize(("ds", "sdp"), ROWS)
def test_times_are_read_one_step_late_and_nothing_in_use_is_freed(ranks4, ds, sdp):
    results = ranks4.run("tests.engine.device_cases:calls_of_steps", timeout=120, ds=ds, sdp=sdp)
    for of_steps, frees, freed_in_use, waiting in results:
        assert freed_in_use == []
        assert (frees > 0) == (ds["stage"] == 3)
        # With ``overlap_refresh`` the last weights are under way still.
        assert waiting == 0 or sdp.get("backward")
        recorded_before, before = 0, 0
        for number, (calls, seconds) in enumerate(of_steps):
            reads = [call for call in calls if call[0] == "read"]
            assert all(call[2] < recorded_before for call in reads), "an event of this very step is read"
            assert [call[1] for call in calls if call[0] == "synchronize"] == [call[2] for call in reads]
            assert bool(reads) == (number > 0)
            before, recorded_before = recorded_before, recorded_before + sum(call[0] == "record" for call in calls)
            # A wait has an event right before and right after it, and every wait is of a collective.
            names = [call[0] for call in calls if call[0] in ("record", "wait", *COLLECTIVES)]
            for place, name in enumerate(names):
                if name == "wait":
                    assert names[place - 1] == names[place + 1] == "record"
            if number > 0:
                assert {"forward", "backward", "step"} <= set(seconds)
                # One moment passes with every wait, by the clock of this device, and with every look before it.
                waits = sum(call[0] == "wait" for call in of_steps[number - 1][0])
                assert seconds["exposed"] >= waits > 0
                assert seconds["communication"] == seconds["exposed"] + seconds["overlapped"]
            else:
                assert set(seconds) == {"communication", "exposed", "overlapped"}
        assert before > 0


def test_a_work_knows_the_memory_of_its_tensors():
    tensors = torch.empty(4), torch.empty(4)
    work = WorkOfDevice(None, "work", [], [tensors[0][1:]], [])
    assert [work.holds(tensor.untyped_storage()) for tensor in tensors] == [True, False]


class Nothing:
    ranks = (0,)


class Work:
    def wait(self):
        return True


def test_a_long_time_between_steps_leaves_few_events():
    with recorded() as (log, busy):
        stopwatch = Stopwatch()
        for _ in range(30_000):
            stopwatch.timed(WorkOfDevice(Work(), "work", log, [], busy), "waiting", Nothing()).wait()
            log.clear()
        assert len(stopwatch._step.unread) <= 10_001
    assert not busy


def test_on_a_cpu_times_are_there_at_once_and_no_future_is_touched():
    stopwatch = Stopwatch()
    with stopwatch.phase("forward"):
        stopwatch.timed(WorkOfDevice(Work(), "work", [], [], []), "waiting", Nothing()).wait()
    stopwatch.end_step()
    seconds = stopwatch.last_step_seconds
    assert 0 < seconds["exposed"] <= seconds["communication"] <= seconds["forward"] < 1


@pytest.mark.parametrize(
    ("ds", "sdp", "names"),
    [
        ({"stage": 1}, {"coverage": 0.5}, {"reduce gradients", "gather weights"}),
        ({"stage": 3}, {"coverage": 0.5}, {"reduce gradients", "gather weights", "wait: gathering weights"}),
        (
            {"stage": 0},
            {"coverage": 0.5, "masking": "backward"},
            {"reduce gradients", "refresh weights", "wait: averaging gradients", "wait: refreshing weights"},
        ),
    ],
)
def test_a_trace_has_names(ranks4, ds, sdp, names):
    for found in ranks4.run("tests.engine.device_cases:traced_names", timeout=60, ds=ds, sdp=sdp):
        expected = {"forward", "backward", "step", "flatten gradients", "optimizer", *names}
        assert {f"deepspeed_sdp::{name}" for name in expected} <= set(found)


@pytest.fixture
def nccl(monkeypatch):
    """A job on NCCL of a version, not begun yet."""

    def make(*version):
        monkeypatch.setattr(start, "get_accelerator", lambda: _Nccl)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)

    monkeypatch.setenv(start.ORDER, "")
    monkeypatch.delenv(start.ORDER)
    return make


class _Nccl:
    @staticmethod
    def communication_backend_name():
        return "nccl"


def test_nccl_keeps_the_order_of_launches(nccl):
    nccl(2, 27, 3)
    start.order_communicators()
    assert os.environ[start.ORDER] == "1"


def test_an_older_nccl_is_refused_unless_the_user_wants_it(nccl, monkeypatch):
    nccl(2, 25, 1)
    with pytest.raises(ConfigError, match=r"NCCL: got 2\.25\.1; takes 2\.26 or newer"):
        start.order_communicators()
    monkeypatch.setenv(start.ORDER, "0")
    start.order_communicators()
    assert os.environ[start.ORDER] == "0"


def test_nccl_that_runs_already_is_told_late(nccl, monkeypatch, caplog):
    nccl(2, 28, 9)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    start.order_communicators()
    assert os.environ[start.ORDER] == "1"
    assert "too late" in caplog.text


def test_gloo_needs_no_order(monkeypatch):
    monkeypatch.delenv(start.ORDER, raising=False)
    start.order_communicators()
    assert start.ORDER not in os.environ
