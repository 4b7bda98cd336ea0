"""How long a step should take: a roofline with stated assumptions, for comparing strategies rather than for planning.

Computation is FLOPs over the GPU's at a given utilisation. Communication is bytes over the slowest link on their way:
that of the node for groups that fit into one, else the network. What is sent while something computes hides behind it
(:attr:`Cluster.overlap`); what comes after the last computation does not. The update is bound by memory: weights,
gradients, master weights and moments are read and written once.
"""

from dataclasses import dataclass

from deepspeed_sdp.estimate.gpu import Cluster
from deepspeed_sdp.estimate.job import Job

# Bytes read and written per element of state in an Adam update: fp32 master weights and moments both ways, the gradient
# once, the new weights once.
_PER_STATE_TENSOR = 8
_PER_ELEMENT = 6


@dataclass(frozen=True)
class StepTime:
    """Seconds.

    Attributes:
        compute: forward and backward passes, of the slowest worker.
        update: the optimizer's.
        communication: all bytes over the link.
        exposed: what of that does not hide behind the passes.
    """

    compute: float
    update: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.update + self.exposed


def step_time(job: Job, cluster: Cluster, flops: float, state_elements: float, sent: dict[str, float]) -> StepTime:
    """Expected time of one step.

    Args:
        flops: of the slowest rank in one step, recomputed ones included.
        state_elements: elements that a rank's optimizer updates.
        sent: bytes by kind, of :mod:`~deepspeed_sdp.estimate.traffic`.
    """
    gpu = cluster.gpu
    link = gpu.link if job.world_size <= cluster.per_node else min(gpu.link, cluster.network)
    compute = flops / (gpu.flops(job.dtype) * cluster.mfu)
    update = state_elements * (_PER_STATE_TENSOR * (1 + job.moments) + _PER_ELEMENT) / gpu.bandwidth
    communication = sum(sent.values()) / link
    # The backward pass hides gradients; at ZeRO-3 both passes hide gathers. Weights sent after the update hide behind
    # nothing but the update of the rest.
    in_passes = sent.get("gradients", 0.0) + (sent.get("weight_gather", 0.0) if job.stage == 3 else 0.0)
    after = (sum(sent.values()) - in_passes) / link
    during = in_passes / link
    # Only the last micro-batch's backward pass is there to hide what is sent once per step.
    room = compute if job.stage >= 2 else compute / job.accumulation
    room *= 1.0 if job.stage == 3 else 2 / 3
    hidden = min(during * cluster.overlap, room)
    beside = update
    if job.sdp is not None and job.sdp.backward.overlap_refresh:
        # What is under way goes on beside the next step's first forward pass.
        beside += cluster.overlap * compute / job.accumulation / 3
    return StepTime(compute, update, communication, during - hidden + max(0.0, after - beside))
