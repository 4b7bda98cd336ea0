"""Backward masking: what moves when a portion's new weights go to all ranks, as ``engine/comm/exchange.py`` does it."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_sdp.estimate.buckets import Bucket, Layout
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.worker_model import WorkerModel
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import SHARED

# As in ``engine/comm/exchange.py``.
_PADDING = 0.05


@dataclass(frozen=True)
class Exchange:
    """What one portion moves, on one rank.

    Attributes:
        sent: bytes that this rank sends.
        live: bytes of buffers that live until it has arrived.
        counted: what of that the engine counts when it bounds what is under way; gloo's own copies it does not know.
        passing: bytes that live for a moment besides, when it leaves.
    """

    sent: int = 0
    live: int = 0
    counted: int = 0
    passing: int = 0


def exchanges(job: Job, model: WorkerModel, plan: SubnetworkPlan, layout: Layout) -> list[Exchange]:
    """One for every portion, in their order."""
    full, shares = _by_round(model, plan, layout)
    return [
        _exchange(
            job,
            [b for round_ in portion for b in layout.rounds[round_] if _is_exchanged(b)],
            sum(full[round_] for round_ in portion),
            max(sum(of_worker) for of_worker in zip(*(shares[round_] for round_ in portion), strict=True))
            * plan.num_subnetworks
            / job.world_size,
            plan.num_subnetworks,
        )
        for portion in layout.portions
    ]


def _is_exchanged(bucket: Bucket) -> bool:
    return bucket.in_place or bucket.weights[0].owner_set != SHARED


def _exchange(job: Job, mine: Sequence[Bucket], full: float, largest: float, workers: int) -> Exchange:
    """``full``: elements of all ranks' shares; ``largest``: of the largest one; ``workers``: how many there are."""
    if not full:
        return Exchange()
    replicas = job.world_size // workers
    share = sum(bucket.numel / bucket.owners for bucket in mine)
    if job.stage > 0 and job.world_size * largest <= (1 + _PADDING) * full:
        outside = _all_gather(job, largest, workers)
    elif job.stage > 0:
        outside = _all_to_all(job, share * (workers - 1), full / replicas - share, share)
    else:
        sent = sum(bucket.numel / bucket.owners * (workers - bucket.owners // replicas) for bucket in mine)
        outside = _all_to_all(job, sent, (full - sum(bucket.numel for bucket in mine)) / replicas, share)
    if replicas == 1:
        return outside
    # Then the slices inside; what came from outside lives until they leave.
    lacked = full if job.stage > 0 else full - sum(bucket.numel for bucket in mine)
    inside = _all_gather(job, lacked / replicas, replicas)
    return Exchange(outside.sent + inside.sent, inside.live, inside.counted, outside.live + outside.passing)


def _all_gather(job: Job, piece: float, ranks: int) -> Exchange:
    """Of equal pieces; gloo gathers into a tensor of its own, and copies."""
    width = job.dtype.itemsize
    counted = int(piece * (ranks + 1)) * width
    copied = int(piece * ranks) * width if job.backend == "gloo" else 0
    return Exchange(int(piece * (ranks - 1)) * width, counted + copied, counted)


def _all_to_all(job: Job, sent: float, received: float, share: float) -> Exchange:
    width = job.dtype.itemsize
    live = int(sent + received) * width
    return Exchange(int(sent) * width, live, live, int(share) * width)


def _by_round(model: WorkerModel, plan: SubnetworkPlan, layout: Layout) -> tuple[list[float], list[list[float]]]:
    """Elements that fall into units, and what each worker sends of them."""
    full = [0.0] * len(layout.rounds)
    shares = [[0.0] * plan.num_subnetworks for _ in layout.rounds]
    planned = {of.space.name: of for of in plan.spaces}
    for place, space in enumerate(model.spaces):
        if space is None:
            continue
        rounds = layout.segmentation.spans[place]
        for round_ in rounds:
            in_round = model.numels[place] / len(rounds)
            full[round_] += in_round
            for chunk in planned[space].chunks:
                owners = plan.owner_sets[chunk.owner_set]
                numel = in_round * (chunk.stop - chunk.start) / planned[space].space.num_units
                for worker in owners:
                    shares[round_][worker] += numel / len(owners)
    return full, shares
