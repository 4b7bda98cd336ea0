"""The engine's rules stand once: whoever changes one changes what is estimated."""

from dataclasses import replace

import pytest
import torch

from deepspeed_sdp import ConfigError, SDPConfig
from deepspeed_sdp.config import default_bucket_numel
from deepspeed_sdp.engine.comm import exchange, mesh, traffic, transport
from deepspeed_sdp.engine.deepspeed import settings
from deepspeed_sdp.engine.zero import bucket_shape, host_copies, rounds
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.engine.zero.launches import Launches
from deepspeed_sdp.engine.zero.refresh import RefreshRules
from deepspeed_sdp.engine.zero.rounds import Rounds, Use
from deepspeed_sdp.estimate import Estimator, Job, job, strategies, wire
from deepspeed_sdp.estimate.gpu import Cluster, find_gpu
from deepspeed_sdp.plan import segmentation
from tests.support.models import tiny_model

CLUSTER = Cluster(find_gpu("h100"))
FORWARD = SDPConfig(num_subnetworks=8, coverage=0.5)
BACKWARD = SDPConfig(num_subnetworks=8, coverage=0.5, masking="backward")
OVERLAPPED = SDPConfig(num_subnetworks=8, coverage=0.5, masking="backward", backward={"overlap_refresh": True})
# Small pieces, so that several are under way.
BASE = Job(8, 1, FORWARD, seq_length=16, bucket=3_000)


@pytest.fixture(scope="module")
def full():
    return tiny_model(meta=True, num_hidden_layers=4, tie_word_embeddings=False)


def figures(full, job):
    """What memory and traffic an estimator that has seen nothing yet finds."""
    found = Estimator(full, CLUSTER).estimate(job)
    return found.largest, found.host, found.sent, found.communicators


def always(value):
    return lambda *_, **__: value


CHANGES = {
    "alignment": ((segmentation, "ALIGNMENT", 64), {}),
    "padding": ((bucket_shape, "padded_numel", lambda numel, owners, _: 2 * len(owners.ranks) * numel), {}),
    "masters": ((BucketShape, "is_own_master", always(False)), {"dtype": torch.float32}),
    "rounds": ((rounds, "segment", lambda *_: segmentation.segment(_[0], 10**9)), {}),
    "rounds under way": ((Launches, "most", 1), {}),
    "when rounds leave": ((Launches, "complete", property(lambda self: self.next)), {"reduce": torch.bfloat16}),
    "when gradients are free": ((Launches, "is_used_up", always(False)), {}),
    "portions": (
        (Rounds, "portions", lambda self, *_, **__: [self._portion(range(len(self.rounds)), True, False)]),
        {},
    ),
    "what is exchanged": ((BucketShape, "is_exchanged", False), {"sdp": BACKWARD}),
    "padding of an exchange": (
        (exchange, "_PADDING", -1.0),
        {"sdp": BACKWARD, "reduce": torch.bfloat16, "gather_bucket": 10_000},
    ),
    "portions under way": ((RefreshRules, "must_wait", always(False)), {"sdp": BACKWARD, "reduce": torch.bfloat16}),
    "what overlaps": ((RefreshRules, "must_wait", lambda *_: _[1] >= 1), {"sdp": OVERLAPPED}),
    "what stays gathered": ((rounds, "_use", lambda _, modules, __: Use(tuple(modules), True, True)), {"stage": 3}),
    "buffers on the host": ((host_copies, "_IN_FLIGHT", 3), {"offload_optimizer": True}),
    "levels of replicas": ((mesh, "_NODES", 8), {"world_size": 1024}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_the_engine_changes_the_estimate(full, monkeypatch, name):
    (where, what, other), keys = CHANGES[name]
    of = replace(BASE, **keys)
    before = figures(full, of)
    assert before == figures(full, of)
    monkeypatch.setattr(where, what, other)
    assert before != figures(full, of)


def test_what_is_imported_by_name_is_the_engine_s():
    assert wire.resolve_transport is transport.resolve_transport
    assert wire.sum_dtype is transport.sum_dtype
    assert wire.gathered_inside is transport.gathered_inside
    assert (wire.route_of, wire.slice_numel) == (exchange.route_of, exchange.slice_numel)
    assert (wire.all_gather_bytes, wire.all_reduce_bytes) == (traffic.all_gather_bytes, traffic.all_reduce_bytes)
    assert job.default_bucket_numel is default_bucket_numel
    assert BASE.reduce_dtype is settings.REDUCE


@pytest.mark.parametrize(
    ("stage", "sdp", "message"),
    [
        (3, BACKWARD, 'masking: got "backward" with ZeRO stage 3'),
        (0, SDPConfig(num_subnetworks=8, coverage=0.5, comm={"transport": "all_to_all"}), 'got "all_to_all" with ZeRO'),
    ],
)
def test_what_the_engine_refuses_is_not_estimated(full, stage, sdp, message):
    with pytest.raises(ConfigError, match=message):
        figures(full, replace(BASE, stage=stage, sdp=sdp))
    block = {"comm": {"transport": sdp.comm.transport}}
    left = {job.stage for job in strategies(BASE, 8, block, maskings=(sdp.masking,)) if job.sdp is not None}
    assert left == set(range(4)) - {stage}


class _Ring:
    backend = "gloo"

    def __init__(self, size):
        self.ranks = range(size)


@pytest.mark.parametrize("levels", [(4,), (4, 2), (2, 3, 4)])
def test_buffers_inside_are_those_of_the_engine_s_gather(monkeypatch, levels):
    monkeypatch.setattr(transport, "start_all_gather", lambda *_: None)
    part = torch.empty(10, dtype=torch.bfloat16, device="meta")
    rings = [_Ring(size) for size in levels]

    def run():
        return (yield from transport.gather_inside(part, rings, lambda work, _: work))

    flow, arriving = run(), None
    while arriving is None:
        try:
            next(flow)
        except StopIteration as end:
            arriving = end.value
    (whole,) = arriving.take()
    assert arriving.nbytes == 2 * transport.gathered_inside(len(whole), levels)
