"""Offloaded state: copies that come late, as on an accelerator, still bring the right numbers, out of pinned memory."""

import itertools

import pytest
import torch

from deepspeed_sdp.engine.zero import host_copies
from deepspeed_sdp.engine.zero.host_copies import HostCopies


class LateAccelerator:
    """Asynchronous copies happen only when an event that was recorded after them is waited for."""

    def __init__(self, monkeypatch):
        self.pinned, self.said, self._queue = [], [], []
        foreach_copy = torch._foreach_copy_
        accelerator = self

        def copy(to, values, non_blocking=False):
            self.said.append("start" if non_blocking else "cast")
            if non_blocking:
                self._queue.append(lambda: foreach_copy(to, values))
            else:
                foreach_copy(to, values)

        class Event:
            def record(self):
                self.place = len(accelerator._queue)

            def synchronize(self):
                accelerator.said.append("wait")
                accelerator.run(self.place)

        self.Event = Event
        monkeypatch.setattr(torch, "_foreach_copy_", copy)
        monkeypatch.setattr(host_copies, "get_accelerator", lambda: self)

    def pin_memory(self, tensor):
        self.pinned.append((tensor.numel(), tensor.dtype))
        return tensor

    def run(self, count=None):
        for place, call in enumerate(self._queue[:count]):
            call()
            self._queue[place] = lambda: None


PORTIONS = [[3, 5], [8], [1, 1, 1], [], [2, 2]]


@pytest.mark.parametrize("pinned", [True, False])
def test_late_copies_bring_every_portion_there_and_back(monkeypatch, pinned):
    accelerator = LateAccelerator(monkeypatch)
    copies = HostCopies(8, torch.bfloat16, is_pinned=pinned, sends=True)
    count = itertools.count()
    gradients = [[torch.full((n,), float(next(count))) for n in numels] for numels in PORTIONS]
    weights = [[torch.zeros(n, dtype=torch.bfloat16) for n in numels] for numels in PORTIONS]
    masters = [[torch.zeros(n) for n in numels] for numels in PORTIONS]
    for of_portion, arrived, shards in zip(masters, copies.fetched(iter(gradients)), weights, strict=True):
        for master, gradient in zip(of_portion, arrived, strict=True):
            master.add_(gradient)
        copies.send(shards, of_portion)
    accelerator.run()
    for expected, got in zip(gradients, weights, strict=True):
        for value, shard in zip(expected, got, strict=True):
            assert torch.equal(value.bfloat16(), shard)
    assert accelerator.pinned == ([(8, torch.float32)] * 2 + [(8, torch.bfloat16)] * 2 if pinned else [])


def test_two_portions_are_under_way_before_the_host_waits(monkeypatch):
    accelerator = LateAccelerator(monkeypatch)
    copies = HostCopies(8, torch.float32, is_pinned=True, sends=True)
    for _ in copies.fetched([torch.ones(8)] for _ in range(4)):
        accelerator.said.append("step")
        copies.send([torch.zeros(8)], [torch.ones(8)])
    there, back = ["wait", "step", "cast", "start"], ["wait", "step", "wait", "cast", "start"]
    assert accelerator.said == ["start", "start", *there, "start", *there, "start", *back, *back]


def test_without_an_accelerator_copies_are_made_at_once():
    copies = HostCopies(4, torch.float32, is_pinned=True, sends=False)
    assert [values[0].tolist() for values in copies.fetched([torch.full((2,), n)] for n in (1.0, 2.0, 3.0))] == [
        [1.0, 1.0],
        [2.0, 2.0],
        [3.0, 3.0],
    ]
