"""What replicas inside and owners outside bring: averages, gathered weights and exchanged ones, of any mesh.

Ranks are threads, which meet in each collective and sleep now and then.
"""

import random
import threading
import time
from collections import Counter

import pytest
import torch
from torch import nn

from deepspeed_sdp.engine.comm import mesh, transport
from deepspeed_sdp.engine.comm.exchange import Exchange
from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.comm.stages import Stages
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import AllToAllTransport, OwnerSetTransport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket, flat_buckets
from deepspeed_sdp.engine.zero.gradients import GradientPath
from deepspeed_sdp.engine.zero.in_place_bucket import InPlaceBucket
from deepspeed_sdp.plan.segmentation import Item, segment
from tests.engine.test_no_circle import random_case

LIMIT = 20.0


class Threads:
    """Collectives between threads."""

    def __init__(self, monkeypatch, backend):
        self.own, self.backend = threading.local(), backend
        self.lock, self.meetings = threading.Lock(), {}
        monkeypatch.setattr(mesh.dist, "get_rank", lambda: self.own.rank)
        monkeypatch.setattr(mesh, "_make", self.make)
        # Rings of two nodes, one in the other, already at the few ranks of a test.
        monkeypatch.setattr(mesh, "_NODES", 1)
        monkeypatch.setattr(mesh, "_LAUNCH", 0)
        mesh._rings.cache_clear()
        monkeypatch.setattr(mesh, "_rings", mesh._rings.__wrapped__)
        for name, together in (
            ("all_reduce", self.all_reduce),
            ("all_to_all_single", self.all_to_all),
            (transport._ALL_GATHER, self.all_gather),
            (transport._REDUCE_SCATTER, self.reduce_scatter),
        ):
            monkeypatch.setattr(transport.dist, name, self.collective(together))

    def make(self, family, purpose):
        ranks = next((ranks for ranks in family if self.own.rank in ranks), None)
        return None if ranks is None else ThreadGroup(self, purpose, ranks)

    def collective(self, together):
        def issue(*arguments, group, async_op):
            if self.own.draw.random() < 0.2:
                time.sleep(self.own.draw.random() * 0.001)
            number = self.own.counts[group.key]
            self.own.counts[group.key] += 1
            with self.lock:
                inputs, done = self.meetings.setdefault((group.key, number), ({}, threading.Event()))
                inputs[group.place] = arguments
                if len(inputs) == len(group.ranks):
                    together([inputs[place] for place in range(len(group.ranks))])
                    done.set()
            return ThreadWork(done)

        return issue

    @staticmethod
    def all_reduce(inputs):
        total = sum(tensor.clone() for (tensor,) in inputs)
        for (tensor,) in inputs:
            tensor.copy_(total)

    @staticmethod
    def all_gather(inputs):
        whole = torch.cat([part for _, part in inputs])
        for output, _ in inputs:
            output.copy_(whole)

    @staticmethod
    def reduce_scatter(inputs):
        total = sum(whole.clone() for _, whole in inputs)
        for part, piece in zip((part for part, _ in inputs), total.chunk(len(inputs)), strict=True):
            part.copy_(piece)

    @staticmethod
    def all_to_all(inputs):
        even = [[len(sent) // len(inputs)] * len(inputs) for _, sent, *_ in inputs]
        pieces = [
            torch.split(sent, sizes[1] if sizes else even[place]) for place, (_, sent, *sizes) in enumerate(inputs)
        ]
        for place, (received, *_) in enumerate(inputs):
            received.copy_(torch.cat([of_sender[place] for of_sender in pieces]))

    def timed(self, work, what, group):
        return work


class ThreadGroup(mesh.Group):
    def __init__(self, threads, purpose, ranks):
        self.threads, self.key = threads, (purpose, tuple(ranks))
        self.ranks, self.place = tuple(ranks), ranks.index(threads.own.rank)

    handle = property(lambda self: self)
    backend = property(lambda self: self.threads.backend)


class ThreadWork:
    def __init__(self, done):
        self.done = done

    def arrives_within(self, seconds):
        return self.done.wait(min(seconds, 0.001))

    def wait(self, is_aside=False):
        assert self.done.wait(LIMIT), "a collective never came together"


def run_rank(threads, seed, rank, case):
    """Averaged shards, gathered weights and exchanged weights of one rank, against what they must be."""
    threads.own.rank, threads.own.counts, threads.own.draw = rank, Counter(), random.Random(seed * 1000 + rank)
    shared, stage, workers = random.Random(seed + 1), case["stage"], case["workers"]
    groups = OwnerGroups(case["sets"], workers, case["ranks_per_node"])
    items = [
        Item((i, 0), shared.randrange(len(case["sets"])), 0, shared.randint(1, 400), i, shared.random() < 0.5)
        for i in range(case["parameters"])
    ]
    # Some are cut: a round has 8 elements for each rank at least.
    segmentation = segment([400] * len(items), case["round_numel"], ranks=len(workers))
    owners = [len(groups.owners(owner_set).ranks) for owner_set in range(len(case["sets"]))]

    def gradient(of_rank, item):
        return torch.arange(item.numel, dtype=torch.float64) + 1000 * item.parameter + 7 * of_rank

    def weight(item):
        return torch.arange(item.numel, dtype=torch.float64) / 3 + item.parameter

    def expected_of(bucket):
        return torch.cat([weight(items[i])[low:high] for i, low, high in bucket.ranges])

    owned = [item for item in items if workers[rank] in case["sets"][item.owner_set]]
    copies = [item for item in items if workers[rank] not in case["sets"][item.owner_set]]
    weights = [nn.Parameter(weight(item)) for item in items]

    def build(of):
        made = []
        for pieces in segmentation.buckets(of, owners):
            of_set = groups.owners(pieces[0].owner_set)
            if pieces[0].in_place:
                made += [InPlaceBucket(b, [weights[i] for i in b.items], of_set, stage > 0) for b in pieces]
            else:
                made += flat_buckets(pieces, weights, of_set, stage > 0)
        return made

    buckets, others = build(owned), build(copies)
    device = torch.device("cpu")
    stages, traffic = Stages(device, groups.replicas), Traffic()

    def transport_on(everyone):
        if case["all_to_all"]:
            return AllToAllTransport(everyone, device, torch.float64, stages, traffic, threads)
        return OwnerSetTransport(stages, traffic, threads)

    def check_sent(sent, times):
        """A rank sends no more than in one ring of all owners."""
        rings = [b.padded_numel * 8 * (len(b.owners.ranks) - 1) / len(b.owners.ranks) for b in sent]
        assert sum(traffic.current.values()) == pytest.approx(times * sum(rings), abs=3 * len(rings))
        traffic.end_step()

    rounds = [[bucket for bucket in buckets if bucket.round == r] for r in range(len(segmentation.numels))]
    mine = {item.parameter: weights[item.parameter] for item in owned}
    path = GradientPath(
        rounds, mine, transport_on(groups.for_gradients), reduce=torch.float64, accumulate=torch.float64
    )
    order = list(owned)
    threads.own.draw.shuffle(order)
    for item in order:
        weights[item.parameter].grad = gradient(rank, item)
        path.add(item.parameter)
        path.ready(item.parameter)
    path.finish()
    is_summed_by_gloo = threads.backend == "gloo" and not case["all_to_all"]
    if stage == 0 or not is_summed_by_gloo or groups.replicas == 1:
        check_sent(buckets, 2 if stage == 0 or is_summed_by_gloo else 1)
    traffic.end_step()
    for bucket, average in path.averages.items():
        ranks = bucket.owners.ranks
        whole = torch.cat(
            [sum(gradient(r, items[i]) for r in ranks)[low:high] / len(ranks) for i, low, high in bucket.ranges]
        )
        whole = nn.functional.pad(whole, (0, bucket.padded_numel - bucket.numel))
        expected = whole[bucket.index * bucket.shard_numel :][: bucket.shard_numel]
        assert torch.allclose(average, expected, rtol=1e-12), "average"
    # An owner knows its own shard of what it owns, at stage 0 all of it; everything else is forgotten, and comes back.
    of_weights, sent_on = transport_on(groups.for_weights), []
    for bucket in buckets:
        if stage > 0:
            forget(bucket, *bucket.share_of(rank))
        if stage > 0 and isinstance(bucket, FlatBucket) and not case["is_exchanged"]:
            sent_on.append(bucket)
    for bucket in others:
        forget(bucket, 0, 0)
    for round_ in range(len(rounds)):
        if stage > 0:
            of_weights.gather([bucket for bucket in rounds[round_] if bucket in sent_on], "weight_gather").finish()
    check_sent(sent_on, 1)
    for bucket in sent_on:
        assert torch.equal(bucket.read(0, bucket.numel), expected_of(bucket)), "gather"
    moves = Exchange(groups.for_weights, stage > 0, device, torch.float64, stages, traffic, threads)
    moves.start(moves.route(sorted((*buckets, *others), key=lambda bucket: bucket.key))).finish()
    for bucket in (*buckets, *others):
        assert torch.equal(bucket.read(0, bucket.numel), expected_of(bucket)), "all"


def forget(bucket, start, stop):
    kept = bucket.read(start, stop).clone()
    bucket.write(0, torch.full((bucket.numel,), -1.0, dtype=torch.float64))
    bucket.write(start, kept)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 200))])
def test_everything_arrives_where_it_belongs(monkeypatch, seed):
    case = random_case(seed)
    threads, failures = Threads(monkeypatch, case["backend"]), []

    def run(rank):
        try:
            run_rank(threads, seed, rank, case)
        except BaseException as error:
            failures.append((rank, error))

    running = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(case["workers"]))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(2 * LIMIT)
    if failures:
        raise AssertionError(case) from failures[0][1]
