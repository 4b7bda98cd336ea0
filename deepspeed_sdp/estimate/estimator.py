"""Estimates of many jobs on one model; what they have in common is worked out once."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.deepspeed.refusals import check_apart, check_stage
from deepspeed_sdp.estimate.buckets import Standing, make_layout
from deepspeed_sdp.estimate.deepspeed_engine import DeepSpeedStep
from deepspeed_sdp.estimate.flops import FlopsPerToken, flops_per_token
from deepspeed_sdp.estimate.gpu import Cluster
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.ledger import KINDS
from deepspeed_sdp.estimate.sdp_engine import EngineStep
from deepspeed_sdp.estimate.step_time import StepTime, step_time
from deepspeed_sdp.estimate.trace import profiles, told
from deepspeed_sdp.estimate.traffic import deepspeed_traffic
from deepspeed_sdp.estimate.worker_model import WorkerModel, worker_model
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import plan_for

_Value = TypeVar("_Value")

# With blocks, workers that are looked at for the heaviest.
_WORKERS = 4


@dataclass(frozen=True)
class Estimate:
    """What one job will need: memory of its heaviest rank, traffic and time of the one that sends most.

    Attributes:
        job: the job.
        plan: who owns what; ``None`` for plain DeepSpeed.
        memory: bytes by kind (``estimate/ledger.py``) when their sum is largest.
        largest: the most of each kind, each at its own time.
        peak: that sum.
        phase: of the step in which it is.
        kept_activations: bytes that autograd keeps for the backward pass.
        host: bytes of state in the host's memory; of the SDP engine with the buffers through which it is copied.
        communicators: of that rank, beside the default group's; each takes memory that is no tensor's.
        flops: per token, model FLOPs.
        step_flops: of the slowest rank in a step, recomputed ones included.
        sent: bytes that the rank sends in a step, by kind.
        time: of a step.
        fits: whether the GPU has room.
    """

    job: Job
    plan: SubnetworkPlan | None
    memory: dict[str, int]
    largest: dict[str, int]
    peak: int
    phase: str
    kept_activations: int
    host: int
    communicators: int
    flops: FlopsPerToken
    step_flops: float
    sent: dict[str, float]
    time: StepTime
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """JSON data: bytes, FLOPs and seconds."""
        job = self.job
        sdp = job.sdp
        return {
            "engine": "sdp" if sdp else "deepspeed",
            "zero_stage": job.stage,
            "masking": sdp.masking if sdp else None,
            "granularity": sdp.granularity if sdp else None,
            "num_subnetworks": self.plan.num_subnetworks if self.plan else None,
            "coverage": self.plan.coverage if self.plan else None,
            "world_size": job.world_size,
            "micro_batch_size": job.micro_batch,
            "seq_length": job.seq_length,
            "gradient_accumulation_steps": job.accumulation,
            "activation_checkpointing": job.checkpointing,
            "memory": self.memory,
            "largest": self.largest,
            "peak": self.peak,
            "phase_of_peak": self.phase,
            "kept_activations": self.kept_activations,
            "host": self.host,
            "communicators": self.communicators,
            "fits": self.fits,
            "flops_per_token": {
                "dense": self.flops.dense,
                "mean": self.flops.mean,
                "max": self.flops.max,
                "min": self.flops.min,
            },
            "flops_per_step": self.step_flops,
            "sent_per_step": self.sent,
            "seconds": {
                "step": self.time.total,
                "compute": self.time.compute,
                "update": self.time.update,
                "communication": self.time.communication,
                "exposed": self.time.exposed,
            },
            "tokens_per_second": job.tokens * job.world_size / self.time.total,
        }


@dataclass
class Estimator:
    """Args:
    full: the full model, on the meta device.
    cluster: what it runs on.
    """

    full: nn.Module
    cluster: Cluster
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def estimate(self, job: Job) -> Estimate:
        """One job.

        Raises:
            ConfigError, ModelError, PlanError: the SDP block does not fit the model, the stage or the number of ranks.
        """
        sdp = job.sdp.largest() if job.sdp is not None and job.sdp.enabled else None
        job = replace(job, sdp=sdp)
        if sdp is not None:
            check_stage(job.stage, sdp)
            check_apart(job.stage, sdp, job.world_size // sdp.subnetworks(job.world_size))
        plan = (
            self._once(
                ("plan", _key(sdp), job.world_size, job.backend),
                lambda: plan_for(self.full, sdp, job.world_size, job.backend),
            )
            if sdp
            else None
        )
        flops = self._once(
            ("flops", _key(sdp), job.world_size, job.seq_length),
            lambda: flops_per_token(self.full, job.seq_length, sdp, plan),
        )
        if plan is None or sdp is None:
            return self._estimate(job, None, flops, 0)
        # Those that hold most; where that is equal, those that compute most.
        workers = sorted(
            range(plan.num_subnetworks), key=lambda w: (plan.owned_numel(w), flops.workers[w]), reverse=True
        )
        # Of neurons all have as many in every layer; with blocks it matters which layers are neighbours.
        tried = workers[: 1 if sdp.granularity == "neuron" else _WORKERS]
        found = [self._estimate(job, plan, flops, worker) for worker in tried]
        sender = max(found, key=lambda one: sum(one.sent.values()))
        return replace(max(found, key=lambda one: one.peak), sent=sender.sent, time=sender.time)

    def _estimate(self, job: Job, plan: SubnetworkPlan | None, flops: FlopsPerToken, worker: int) -> Estimate:
        # What the plan depends on.
        placed = (_key(job.sdp), job.world_size if plan else 0, job.backend, worker)
        model: WorkerModel = self._once(
            ("model", *placed, job.dtype), lambda: worker_model(self.full, job.dtype, job.sdp, plan, worker)
        )
        shape = (job.micro_batch, job.seq_length, job.checkpointing)
        # Whoever has the same kinds of layers computes alike.
        alike = (_key(job.sdp), model.kinds, job.dtype)
        moments = told(model, self._once(("profiles", *alike, *shape), lambda: profiles(model, *shape)))
        if plan is None:
            ledger = DeepSpeedStep(job, model).run(moments)
            sent = deepspeed_traffic(job, model.numels)
            elements = sum(model.numels) / (job.world_size if job.stage else 1)
            groups, host = 0, _host_bytes(job, elements)
        else:
            standing = self._once(
                ("standing", *placed),
                lambda: Standing.of(plan, job, self.cluster.per_node, worker),
            )
            step = EngineStep(job, model, make_layout(model, plan, job, standing))
            ledger, host = step.run(moments), step.host
            sent = {kind: float(nbytes) for kind, nbytes in step.sent.items() if nbytes}
            elements = float(step.layout.shard_numel)
            groups = standing.communicators
        step_flops = job.tokens * (flops.max + _recomputed(job, flops, self.full))
        return Estimate(
            job,
            plan,
            ledger.at_peak,
            {kind: ledger.largest[kind] for kind in KINDS},
            ledger.peak,
            ledger.phase_of_peak,
            next(moment.live for moment in moments if moment.kind == "loss"),
            host,
            groups,
            flops,
            step_flops,
            sent,
            step_time(job, self.cluster, step_flops, elements, sent),
            ledger.peak + self.cluster.reserved + (groups if job.backend == "nccl" else 0) * self.cluster.communicator
            <= self.cluster.gpu.memory,
        )

    def _once(self, key: Any, make: Callable[[], _Value]) -> _Value:
        if key not in self._made:
            self._made[key] = make()
        value: _Value = self._made[key]
        return value


def _key(sdp: SDPConfig | None) -> str:
    return sdp.model_dump_json() if sdp else ""


def _host_bytes(job: Job, elements: float) -> int:
    state = 4 * elements * (1 + job.moments) if job.offload_optimizer else 0.0
    return int(state + (elements * job.dtype.itemsize if job.offload_param else 0.0))


def _recomputed(job: Job, flops: FlopsPerToken, full: nn.Module) -> float:
    """FLOPs per token that are computed a second time: the forward pass of the layers, a third of their training."""
    if not job.checkpointing:
        return 0.0
    model: Any = full
    head = model.get_output_embeddings()
    of_head = 6.0 * head.weight.numel() if head is not None else 0.0
    is_backward = job.sdp is not None and job.sdp.masking == "backward"
    return ((flops.dense if is_backward else flops.max) - of_head) / 3
