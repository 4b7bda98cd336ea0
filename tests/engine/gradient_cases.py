"""The way of gradients alone: no model, gradients that become ready in another order on every rank."""

import random
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_sdp.engine.comm.groups import OwnerGroups
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import AllToAllTransport, OwnerSetTransport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.gradients import GradientPath
from deepspeed_sdp.plan.rounds import Item, make_buckets, make_rounds


def gradient_of(rank, parameter, numel, round_):
    generator = torch.Generator().manual_seed(1000 * round_ + 100 * parameter + rank)
    return torch.randn(numel, generator=generator, dtype=torch.float64)


def reduce_in_random_order(seed, all_to_all, sharded=True, rounds=4, parameters=24):
    """Largest error of the averaged shards over all rounds. A fifth of the gradients never comes: it counts as zero."""
    shared, own = random.Random(seed), random.Random(seed * 10 + dist.get_rank())
    rank, world = dist.get_rank(), dist.get_world_size()
    sets = [
        tuple(range(world)),
        *(tuple(sorted(shared.sample(range(world), shared.randint(1, world - 1)))) for _ in range(5)),
    ]
    groups = OwnerGroups(SimpleNamespace(owner_sets=tuple(sets)), range(world))
    layout = [
        Item((i // 3, i % 3), shared.randrange(len(sets)), shared.randrange(2), shared.randint(1, 40), i)
        for i in range(parameters)
    ]
    round_of = make_rounds([100] * (parameters // 3), shared.choice([1, 250, 10_000]))
    mine = {item.parameter: item for item in layout if rank in sets[item.owner_set]}
    missing = {(r, i) for r in range(world) for i in range(parameters) if shared.random() < 0.2}
    weights = {i: nn.Parameter(torch.zeros(item.numel, dtype=torch.float64)) for i, item in mine.items()}
    flats = [
        FlatBucket(
            bucket,
            [weights[i] for i in bucket.items],
            groups.ranks(bucket.owner_set),
            rank,
            groups.group(bucket.owner_set),
            is_sharded=sharded,
        )
        for bucket in make_buckets(mine.values(), round_of)
    ]
    if all_to_all:
        transport = AllToAllTransport(groups.for_gradients, torch.device("cpu"), torch.float64, Traffic(), Stopwatch())
    else:
        transport = OwnerSetTransport(Traffic(), Stopwatch())
    by_round = [[flat for flat in flats if flat.round == r] for r in range(max(round_of) + 1)]
    path = GradientPath(by_round, weights, transport, reduce=torch.float64, accumulate=torch.float64)
    worst = 0.0
    for round_ in range(rounds):
        order = [parameter for parameter in mine if (rank, parameter) not in missing]
        own.shuffle(order)
        for parameter in order:
            weights[parameter].grad = gradient_of(rank, parameter, mine[parameter].numel, round_)
            path.add(parameter)
            path.ready(parameter)
            if own.random() < 0.1:
                time.sleep(own.random() * 0.01)
        path.finish()
        assert path.in_flight_bytes == 0
        assert all(weight.grad is None for weight in weights.values())
        assert set(path.averages) == set(flats)
        for flat, average in path.averages.items():
            expected = torch.cat([average_of(i, mine[i], sets, missing, round_) for i in flat.items])
            expected = nn.functional.pad(expected, (0, flat.padded_numel - flat.numel))
            part = expected.narrow(0, flat.index * flat.shard_numel, flat.shard_numel)
            worst = max(worst, float((average - part).abs().max()))
        path.clear()
    groups.destroy()
    return worst


def reduce_beside_a_users_barrier():
    """Averages, where rank 0 is at a barrier of the user's before its first gradient, rank 1 before its last."""
    groups = OwnerGroups(SimpleNamespace(owner_sets=((0, 1),)), range(2))
    weights = {i: nn.Parameter(torch.zeros(4)) for i in range(6)}
    buckets = [
        FlatBucket(
            bucket, [weights[i] for i in bucket.items], (0, 1), dist.get_rank(), groups.group(0), is_sharded=False
        )
        for bucket in make_buckets([Item((i, 0), 0, 0, 4, i) for i in range(6)], range(6))
    ]
    path = GradientPath(
        [[bucket] for bucket in buckets],
        weights,
        OwnerSetTransport(Traffic(), Stopwatch()),
        reduce=torch.float32,
        accumulate=torch.float32,
    )
    for index, weight in weights.items():
        if index == (0 if dist.get_rank() == 0 else 5):
            dist.barrier()
        weight.grad = torch.full((4,), float(index + dist.get_rank()))
        path.add(index)
        path.ready(index)
    path.finish()
    groups.destroy()
    return [float(average[0]) for average in path.averages.values()]


def average_of(parameter, item, sets, missing, round_):
    owners = sets[item.owner_set]
    copies = [gradient_of(r, parameter, item.numel, round_) for r in owners if (r, parameter) not in missing]
    return sum(copies, torch.zeros(item.numel, dtype=torch.float64)) / len(owners)
