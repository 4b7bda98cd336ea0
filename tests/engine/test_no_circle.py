"""The collectives of a step, rank by rank as the engine issues them, and whether any order of events lets all through.

No processes: every rank's calls are recorded in turn, with gradients, waits and uses of weights in an order of its own,
and the records are then played together. A collective is done when all of its group have issued it.
"""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from deepspeed_sdp.engine.comm import exchange, mesh, transport
from deepspeed_sdp.engine.comm.exchange import Exchange
from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.comm.stages import Stages
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import AllToAllTransport, OwnerSetTransport
from deepspeed_sdp.engine.zero.flat_bucket import flat_buckets
from deepspeed_sdp.engine.zero.gradients import GradientPath
from deepspeed_sdp.plan.segmentation import Item, segment

COLLECTIVES = ("all_reduce", "all_to_all_single", transport._ALL_GATHER, transport._REDUCE_SCATTER)


class Recorder:
    """What one rank after the other does: ``("issue", group, number, signature)`` and ``("wait", group, number)``."""

    def __init__(self, monkeypatch, backend):
        self.rank, self.backend = 0, backend
        self.events = {}
        self.draw = random.Random()
        monkeypatch.setattr(mesh.dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(mesh, "_make", self.make)
        # Rings of two nodes, one in the other, already at the few ranks of a test.
        monkeypatch.setattr(mesh, "_NODES", 1)
        monkeypatch.setattr(mesh, "_LAUNCH", 0)
        mesh._rings.cache_clear()
        monkeypatch.setattr(mesh, "_rings", mesh._rings.__wrapped__)
        for name in COLLECTIVES:
            monkeypatch.setattr(transport.dist, name, self.collective(name))
        assert exchange.dist is transport.dist

    def begin(self, rank, seed):
        self.rank, self.events[rank], self.counts = rank, [], Counter()
        self.draw = random.Random(seed * 1000 + rank)

    def make(self, family, purpose):
        ranks = next((ranks for ranks in family if self.rank in ranks), None)
        return None if ranks is None else RecordedGroup(self, purpose, ranks)

    def collective(self, name):
        def issue(*tensors, group, async_op):
            assert async_op
            number = self.counts[group.key]
            self.counts[group.key] += 1
            # Of uneven messages a rank sends what is its own.
            numels = () if name == "all_to_all_single" else tuple(t.numel() for t in tensors)
            self.events[self.rank].append(("issue", group.key, number, (name, numels)))
            return RecordedWork(self, group.key, number)

        return issue

    def timed(self, work, what, group):
        return work


class RecordedGroup(mesh.Group):
    def __init__(self, recorder, purpose, ranks):
        self.recorder, self.key = recorder, (purpose, tuple(ranks))
        self.ranks, self.place = tuple(ranks), ranks.index(recorder.rank)

    handle = property(lambda self: self)
    backend = property(lambda self: self.recorder.backend)


class RecordedWork:
    def __init__(self, recorder, key, number):
        self.recorder, self.key, self.number = recorder, key, number

    def arrives_within(self, seconds):
        """Sometimes it is late; if it is not, all have issued it."""
        if self.recorder.draw.random() < 0.5:
            return False
        self.wait()
        return True

    def wait(self, is_aside=False):
        self.recorder.events[self.recorder.rank].append(("wait", self.key, self.number))


def play(events, *, issuing_blocks):
    """Let every rank go on as far as it can, until all are through; the positions of those that never are."""
    at, issued = dict.fromkeys(events, 0), {}
    signatures = {}
    moved = True
    while moved:
        moved = False
        for rank, of_rank in events.items():
            while at[rank] < len(of_rank):
                kind, key, number, *signature = of_rank[at[rank]]
                if kind == "issue":
                    issued.setdefault((key, number), set()).add(rank)
                    assert signatures.setdefault((key, number), signature) == signature, (rank, key, number)
                if (kind == "wait" or issuing_blocks) and issued.get((key, number), set()) != set(key[1]):
                    break
                at[rank] += 1
                moved = True
    return {rank: of_rank[at[rank]] for rank, of_rank in events.items() if at[rank] < len(of_rank)}


def random_case(seed):
    draw = random.Random(seed)
    replicas = draw.choice([1, 2, 3, 4, 4, 8])
    workers = draw.choice([w for w in (1, 2, 3, 4, 6) if w * replicas <= 16])
    stage = draw.randrange(4)
    sets = [tuple(range(workers))]
    for _ in range(draw.randint(1, 5)):
        sets.append(tuple(sorted(draw.sample(range(workers), draw.randint(1, workers)))))
    return {
        "sets": sets,
        "workers": draw.choice(
            [[r // replicas for r in range(workers * replicas)], [r % workers for r in range(workers * replicas)]]
        ),
        "ranks_per_node": draw.choice([None, 1, 2]),
        "stage": stage,
        "all_to_all": stage > 0 and draw.random() < 0.5,
        "backend": draw.choice(["gloo", "nccl"]),
        "is_exchanged": stage < 3 and draw.random() < 0.5,
        "parameters": draw.choice([6, 15]),
        "round_numel": draw.choice([1, 250, 10_000]),
        "prefetch": draw.randint(0, 1),
    }


def run_rank(recorder, seed, rank, case):
    """Two steps of one rank: gradients, then weights; at stage 3 gathers and reductions part by part."""
    shared, own, stage = random.Random(seed + 1), recorder.draw, case["stage"]
    groups = OwnerGroups(case["sets"], case["workers"], case["ranks_per_node"])
    items = [
        Item((i, 0), shared.randrange(len(case["sets"])), 0, shared.randint(1, 40), i)
        for i in range(case["parameters"])
    ]
    segmentation = segment([100] * len(items), case["round_numel"], ranks=len(case["workers"]))
    owners = [len(groups.owners(owner_set).ranks) for owner_set in range(len(case["sets"]))]
    weights = [nn.Parameter(torch.zeros(item.numel)) for item in items]

    def build(of):
        return [
            bucket
            for pieces in segmentation.buckets(of, owners)
            for bucket in flat_buckets(pieces, weights, groups.owners(pieces[0].owner_set), stage > 0)
        ]

    worker = case["workers"][rank]
    owned = build([item for item in items if worker in case["sets"][item.owner_set]])
    copies = build([item for item in items if worker not in case["sets"][item.owner_set]])
    device, stages = torch.device("cpu"), Stages(torch.device("cpu"), groups.replicas)

    def transport_on(everyone):
        if case["all_to_all"]:
            return AllToAllTransport(everyone, device, torch.float32, stages, Traffic(), recorder)
        return OwnerSetTransport(stages, Traffic(), recorder)

    rounds = [[bucket for bucket in owned if bucket.round == r] for r in range(len(segmentation.numels))]
    mine = {index: weights[index] for bucket in owned for index in bucket.items}
    path = GradientPath(
        rounds,
        mine,
        transport_on(groups.for_gradients),
        reduce=torch.float32,
        accumulate=torch.float32,
        is_eager=stage < 3,
    )
    of_weights = transport_on(groups.for_weights)
    everyone = [bucket for bucket in (*owned, *copies) if bucket.owner_set != 0]
    moves = Exchange(groups.for_weights, stage > 0, device, torch.float32, stages, Traffic(), recorder)
    lazy = []
    for _ in range(2):
        if stage < 3:
            for pending in lazy:  # in the next forward pass, whenever a layer needs it
                pending.finish()
            order = [index for index in mine if own.random() < 0.8]
            own.shuffle(order)
            for index in order:
                path.ready(index)
        else:
            backward_in_parts(path, of_weights, rounds, case["prefetch"], own)
        path.finish()
        path.clear()
        lazy = []
        for round_ in reversed(range(len(rounds))):
            if 0 < stage < 3:
                gathered = [b for b in rounds[round_] if not case["is_exchanged"] or b.owner_set == 0]
                lazy.append(of_weights.gather(gathered, "weight_gather"))
            if case["is_exchanged"]:
                of_round = sorted((b for b in everyone if b.round == round_), key=lambda bucket: bucket.key)
                lazy.append(moves.start(moves.route(of_round)))
            while lazy and own.random() < 0.3:
                lazy.pop(0).finish()
        if own.random() < 0.5:
            while lazy:
                lazy.pop(0).finish()


def backward_in_parts(path, of_weights, rounds, prefetch, own):
    """The sequence of ZeRO-3: every round a part, gathered with those ahead before what is behind is reduced."""
    pending, issued = {}, 0
    for round_ in range(len(rounds)):
        while issued < min(round_ + 1 + prefetch, len(rounds)):
            pending[issued] = of_weights.gather(rounds[issued], "weight_gather")
            issued += 1
        path.launch_before(round_)
        # A worker without any of it need not wait here.
        for part in list(pending):
            if part <= round_ and (rounds[part] or own.random() < 0.5):
                pending.pop(part).finish()
    for part in sorted(pending):
        pending.pop(part).finish()


SEEDS = [*range(40), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(40, 500))]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_rank_waits_for_another_in_a_circle(monkeypatch, seed):
    case = random_case(seed)
    recorder = Recorder(monkeypatch, case["backend"])
    for rank in range(len(case["workers"])):
        recorder.begin(rank, seed)
        run_rank(recorder, seed, rank, case)
    for issuing_blocks in (False, True):
        assert not play(recorder.events, issuing_blocks=issuing_blocks), (case, issuing_blocks)


def test_a_circle_is_found():
    ab, ac = ("a", (0, 1)), ("b", (0, 1))
    first = [("issue", ab, 0, ()), ("wait", ab, 0), ("issue", ac, 0, ())]
    second = [("issue", ac, 0, ()), ("wait", ac, 0), ("issue", ab, 0, ())]
    assert set(play({0: first, 1: second}, issuing_blocks=False)) == {0, 1}
