"""The way of gradients alone: no model, gradients that become ready in another order on every rank."""

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
from deepspeed_sdp.engine.zero.flat_bucket import flat_buckets
from deepspeed_sdp.engine.zero.gradients import GradientPath
from deepspeed_sdp.plan.segmentation import Item, Segmentation, segment


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
    segmentation = segment([100] * (parameters // 3), shared.choice([1, 50, 250, 10_000]), ranks=world)
    mine = {item.parameter: item for item in layout if rank in sets[item.owner_set]}
    missing = {(r, i) for r in range(world) for i in range(parameters) if shared.random() < 0.2}
    weights = {i: nn.Parameter(torch.zeros(item.numel, dtype=torch.float64)) for i, item in mine.items()}
    flats = [
        flat
        for pieces in segmentation.buckets(mine.values(), [len(owners) for owners in sets])
        for flat in flat_buckets(pieces, weights, groups.owners(pieces[0].owner_set), is_sharded=sharded)
    ]
    device = torch.device("cpu")
    stages = Stages(device, replicas)
    if all_to_all:
        transport = AllToAllTransport(groups.for_gradients, device, torch.float64, stages, Traffic(), Stopwatch())
    else:
        transport = OwnerSetTransport(stages, Traffic(), Stopwatch())
    by_round = [[flat for flat in flats if flat.round == r] for r in range(len(segmentation.numels))]
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
            expected = torch.cat(
                [average_of(i, mine[i], sets, missing, round_)[start:stop] for i, start, stop in flat.ranges]
            )
            expected = nn.functional.pad(expected, (0, flat.padded_numel - flat.numel))
            part = expected.narrow(0, flat.index * flat.shard_numel, flat.shard_numel)
            worst = max(worst, float((average - part).abs().max()))
        path.clear()
    groups.destroy()
    return worst


def reduce_beside_a_users_barrier():
    """Averages, where rank 0 is at a barrier of the user's before its first gradient, rank 1 before its last."""
    groups = OwnerGroups([(0, 1)], range(2))
    weights = {i: nn.Parameter(torch.zeros(4)) for i in range(6)}
    segmentation = Segmentation(tuple(range(i, i + 1) for i in range(6)), (4,) * 6)
    buckets = [
        flat_buckets(pieces, weights, groups.owners(0), is_sharded=False)
        for pieces in segmentation.buckets([Item((i, 0), 0, 0, 4, i) for i in range(6)], [2])
    ]
    path = GradientPath(
        buckets,
        weights,
        OwnerSetTransport(Stages(torch.device("cpu"), 1), Traffic(), Stopwatch()),
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
