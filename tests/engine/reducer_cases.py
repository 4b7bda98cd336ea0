"""The reducer alone: no model, gradients that become ready in another order on every rank."""

import random
import time

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.comm.stages import Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import AllToAllTransport, OwnerSetTransport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.reducer import Reducer
from deepspeed_sdp.plan.rounds import Item, make_buckets, make_rounds


def gradient_of(rank, parameter, numel, round_):
    generator = torch.Generator().manual_seed(1000 * round_ + 100 * parameter + rank)
    return torch.randn(numel, generator=generator, dtype=torch.float64)


def reduce_in_random_order(seed, all_to_all, sharded=True, replicas=1, rounds=4, parameters=24):
    """Largest error of the averaged shards over all rounds. A fifth of the gradients never comes: it counts as zero."""
    shared, own = random.Random(seed), random.Random(seed * 10 + dist.get_rank())
    rank, world = dist.get_rank(), dist.get_world_size()
    workers = [r // replicas for r in range(world)]
    count = world // replicas
    of_workers = [
        tuple(range(count)),
        *(tuple(sorted(shared.sample(range(count), shared.randint(1, count - 1)))) for _ in range(5)),
    ]
    groups = OwnerGroups(of_workers, workers)
    sets = [tuple(r for r in range(world) if workers[r] in owners) for owners in of_workers]
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
            groups.owners(bucket.owner_set),
            is_sharded=sharded,
        )
        for bucket in make_buckets(mine.values(), round_of)
    ]
    averages, state = {}, {"round": 0}

    def flatten(flat):
        values = [
            None if (rank, i) in missing else gradient_of(rank, i, mine[i].numel, state["round"])
            for i in flat.bucket.items
        ]
        return flat.flatten(values, torch.float64)

    def keep(flat, shard):
        averages[flat] = shard.clone()

    device = torch.device("cpu")
    stages = Stages(device, replicas)
    if all_to_all:
        transport = AllToAllTransport(groups.for_gradients, device, torch.float64, stages, Traffic(), Stopwatch())
    else:
        transport = OwnerSetTransport(stages, Traffic(), Stopwatch())
    by_round = [[flat for flat in flats if flat.bucket.round == r] for r in range(max(round_of) + 1)]
    reducer = Reducer(by_round, transport, flatten, keep)
    worst = 0.0
    for round_ in range(rounds):
        state["round"] = round_
        averages.clear()
        order = [parameter for parameter in mine if (rank, parameter) not in missing]
        own.shuffle(order)
        for parameter in order:
            reducer.ready(parameter)
            if own.random() < 0.1:
                time.sleep(own.random() * 0.01)
        reducer.finish()
        assert reducer.in_flight_bytes == 0
        assert set(averages) == set(flats)
        for flat, average in averages.items():
            expected = flat.flatten(
                [average_of(i, mine[i], sets, missing, round_) for i in flat.bucket.items], torch.float64
            )
            part = expected.narrow(0, flat.index * flat.shard_numel, flat.shard_numel)
            worst = max(worst, float((average - part).abs().max()))
    groups.destroy()
    return worst


def average_of(parameter, item, sets, missing, round_):
    owners = sets[item.owner_set]
    copies = [gradient_of(r, parameter, item.numel, round_) for r in owners if (r, parameter) not in missing]
    return sum(copies, torch.zeros(item.numel, dtype=torch.float64)) / len(owners)
