"""Bytes that plain DeepSpeed sends in one step, by kind, in rings."""

from collections.abc import Sequence

from deepspeed_sdp.estimate.job import Job


def deepspeed_traffic(job: Job, numels: Sequence[int]) -> dict[str, float]:
    """Of plain DeepSpeed; its ZeRO-1 and 2 average with all-reduces (``use_multi_rank_bucket_allreduce``)."""
    ring = sum(numels) * (job.world_size - 1) / job.world_size
    times = job.accumulation if job.stage >= 2 else 1
    gradients = times * ring * job.reduce_dtype.itemsize * (1 if job.stage == 3 else 2)
    if job.stage == 0:
        return {"gradients": gradients}
    gathers = 2 * job.accumulation if job.stage == 3 else 1
    return {"gradients": gradients, "weight_gather": ring * job.dtype.itemsize * gathers}
