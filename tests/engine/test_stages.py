"""Collectives one after the other: who waits in between, and when they are issued."""

import contextlib

import pytest
import torch

from deepspeed_sdp.engine.comm.stages import Arriving, Stages


class Device:
    """An accelerator's module, which notes what happens on which stream."""

    def __init__(self):
        self.log, self.now = [], "compute"

    def Stream(self, device):
        device_module = self

        class Aside:
            def wait_stream(self, other):
                device_module.log.append(f"aside waits for {other}")

        return Aside()

    def current_stream(self):
        return "compute"

    @contextlib.contextmanager
    def stream(self, stream):
        self.now = "aside"
        yield
        self.now = "compute"


class Work:
    def __init__(self, device, name):
        self.device, self.name, self.has_come = device, name, False
        device.log.append(f"{name} issued on {device.now}")

    def arrives_within(self, seconds):
        return self.has_come

    def wait(self, is_aside=False):
        assert is_aside == (self.device.now == "aside")
        self.device.log.append(f"{self.name} waited for on {self.device.now}")


def two_stages(device, works):
    works.append(Work(device, "first"))
    yield works[-1]
    works.append(Work(device, "second"))
    return Arriving([works[-1]], lambda: ["result"], nbytes=7)


def test_an_accelerator_gets_everything_at_once_and_waits_aside(monkeypatch):
    device, works = Device(), []
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    given = torch.zeros(1)
    pending = Stages(torch.device("cuda"), 2).start([two_stages(device, works)], can_wait=True, held=[given])
    assert device.log == [
        "aside waits for compute",
        "first issued on aside",
        "aside waits for compute",
        "first waited for on aside",
        "second issued on aside",
    ]
    assert pending._held == [given], "another stream uses it, and it must live until the result is there"
    assert pending.finish() == ["result"]
    assert device.log[-1] == "second waited for on compute"


def test_with_one_replica_there_is_no_stream_aside(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: pytest.fail("no stream is needed"))
    device = Device()

    def flow():
        return Arriving([Work(device, "only")], list)
        yield

    Stages(torch.device("cuda"), 1).start([flow()]).finish()
    assert device.log == ["only issued on compute", "only waited for on compute"]


@pytest.mark.parametrize("can_wait", [True, False])
def test_on_a_cpu_the_host_waits_where_it_may(can_wait):
    device, works = Device(), []
    pending = Stages(torch.device("cpu"), 2).start([two_stages(device, works)], can_wait=can_wait, nbytes=20)
    assert len(works) == (1 if can_wait else 2)
    assert pending.nbytes == (20 if can_wait else 7)
    assert not pending.arrives_within(0.0)
    works[0].has_come = True
    assert not pending.arrives_within(0.0)
    assert len(works) == 2, "what follows is issued when it is seen that the first has come"
    works[1].has_come = True
    assert pending.arrives_within(0.0)
    assert pending.finish() == ["result"]
