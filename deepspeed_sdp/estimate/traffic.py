"""Bytes that a rank sends in one step, by kind, in rings as in ``engine/comm``; and over how many communicators."""

from collections.abc import Sequence

from deepspeed_sdp.engine.comm.mesh import Mesh
from deepspeed_sdp.estimate.buckets import Layout
from deepspeed_sdp.estimate.exchange import exchanges
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.worker_model import WorkerModel
from deepspeed_sdp.plan import SubnetworkPlan, place_workers
from deepspeed_sdp.subnetwork import SHARED


def sdp_traffic(job: Job, model: WorkerModel, plan: SubnetworkPlan, layout: Layout, is_tied: bool) -> dict[str, float]:
    """Of the SDP engine, by the engine's names of kinds; shards with their padding."""
    reduced = job.reduce_dtype.itemsize
    width = job.dtype.itemsize
    times = job.accumulation if job.stage >= 2 else 1
    is_all_to_all = job.transport("gradients") == "all_to_all"
    is_backward = job.sdp is not None and job.sdp.masking == "backward"
    sent = dict.fromkeys(("gradients", "weight_gather", "weight_refresh"), 0.0)
    for bucket in layout.buckets:
        n = bucket.owners
        ring = (n - 1) / n
        if bucket.shards == 1:
            ring *= 2
        elif job.backend == "gloo" and not is_all_to_all:
            # An all-reduce outside, of what the all-to-all inside leaves.
            ring += (n // bucket.replicas - 1) / n
        sent["gradients"] += times * bucket.padded * reduced * ring
        if job.stage in (1, 2) and not (is_backward and (bucket.in_place or bucket.weights[0].owner_set != SHARED)):
            sent["weight_gather"] += bucket.padded * width * (n - 1) / n
        if job.stage == 3:
            sent["weight_gather"] += (
                job.accumulation
                * bucket.padded
                * width
                * (n - 1)
                / n
                * _gathers(bucket.weights[0].part, model.last_part, is_tied)
            )
    if is_backward:
        sent["weight_refresh"] = float(sum(exchange.sent for exchange in exchanges(job, model, plan, layout)))
    return {kind: nbytes for kind, nbytes in sent.items() if nbytes}


def _gathers(part: int, last: int, is_tied: bool) -> int:
    """Times that a part is gathered in a forward and backward pass at ZeRO-3.

    The last layer and what comes after it stay from the one to the other; an embedding is not needed backwards.
    """
    return 1 if part >= last - 1 or part == 0 else 2


def deepspeed_traffic(job: Job, numels: Sequence[int]) -> dict[str, float]:
    """Of plain DeepSpeed; its ZeRO-1 and 2 average with all-reduces (``use_multi_rank_bucket_allreduce``)."""
    ring = sum(numels) * (job.world_size - 1) / job.world_size
    times = job.accumulation if job.stage >= 2 else 1
    gradients = times * ring * job.reduce_dtype.itemsize * (1 if job.stage == 3 else 2)
    if job.stage == 0:
        return {"gradients": gradients}
    gathers = 2 * job.accumulation if job.stage == 3 else 1
    return {"gradients": gradients, "weight_gather": ring * job.dtype.itemsize * gathers}


def communicators(plan: SubnetworkPlan, job: Job, ranks_per_node: int, worker: int) -> int:
    """Communicators of a rank that trains subnetwork ``worker``, beside the default one."""
    assert job.sdp is not None
    workers = place_workers(plan, job.world_size, ranks_per_node, job.sdp.plan.rank_order)
    return len(Mesh(plan.owner_sets, workers, ranks_per_node).groups_of(workers.index(worker)))
