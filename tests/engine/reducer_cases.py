"""The reducer alone: no model, gradients that become ready in another order on every rank."""

import random
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.buckets import BucketItem, make_buckets
from deepspeed_sdp.engine.groups import OwnerGroups
from deepspeed_sdp.engine.reducer import Reducer
from deepspeed_sdp.engine.traffic import Traffic


def gradient_of(rank, parameter, numel, round_):
    generator = torch.Generator().manual_seed(1000 * round_ + 100 * parameter + rank)
    return torch.randn(numel, generator=generator, dtype=torch.float64)


def reduce_in_random_order(seed, rounds=4, parameters=24):
    """Largest error of the averages over all rounds. A fifth of the gradients never comes: it counts as zero."""
    shared, own = random.Random(seed), random.Random(seed * 10 + dist.get_rank())
    rank, world = dist.get_rank(), dist.get_world_size()
    sets = [
        tuple(range(world)),
        *(tuple(sorted(shared.sample(range(world), shared.randint(1, world - 1)))) for _ in range(5)),
    ]
    groups = OwnerGroups(SimpleNamespace(owner_sets=tuple(sets)), range(world))
    layout = [
        BucketItem((i // 3, i % 3), shared.randrange(len(sets)), shared.randint(1, 40), i) for i in range(parameters)
    ]
    size = shared.choice([1, 30, 100])
    mine = {item.parameter: item for item in layout if rank in sets[item.owner_set]}
    missing = {(r, i) for r in range(world) for i in range(parameters) if shared.random() < 0.2}
    averages, state = {}, {"round": 0}

    def gradient(parameter):
        whole = gradient_of(rank, parameter, mine[parameter].numel, state["round"])
        return whole * ((rank, parameter) not in missing)

    def consume(parameter, average):
        averages[parameter] = average.clone()

    reducer = Reducer(make_buckets(mine.values(), size), groups, gradient, consume, torch.float64, Traffic())
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
        assert set(averages) == set(mine)
        for parameter, average in averages.items():
            owners = sets[mine[parameter].owner_set]
            copies = [
                gradient_of(r, parameter, average.numel(), round_) for r in owners if (r, parameter) not in missing
            ]
            expected = sum(copies, torch.zeros_like(average)) / len(owners)
            worst = max(worst, float((average - expected).abs().max()))
    groups.destroy()
    return worst
