"""Training FLOPs per token, of the full model and of every worker's part of it.

Counted are matrix products: linears of the decoder layers and the output head, 2 FLOPs per weight for the forward
pass, 2 for the gradient of the input and 2 for that of the weight; and attention's scores and weighted values at the
whole sequence length, 4 forward and 8 backward. That is the usual count of model FLOPs, by which utilisation (MFU) is
defined.

Not counted: element-wise operations, biases, norms, softmax and loss, rotary tables, the embedding (a look-up), the
optimizer; what is computed twice (activation checkpointing, ``recompute_frozen``, the scores in a fused kernel's
backward pass).
A causal kernel that skips the upper half of the scores, or a sliding window, computes less than is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepspeed_sdp.adapters import PartitionedModule, find_adapter
from deepspeed_sdp.adapters.base import matmul_flops, weight_gradient_flops
from deepspeed_sdp.config import SDPConfig, SDPSource
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import plan_for


@dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs (forward and backward) per token of one sequence.

    Attributes:
        dense: of the full model.
        workers: of each worker's subnetwork; empty where there is no plan.
    """

    dense: float
    workers: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """The workers' mean: what a token of a job costs. Without a plan: :attr:`dense`."""
        return sum(self.workers) / len(self.workers) if self.workers else self.dense

    @property
    def max(self) -> float:
        """The slowest worker's, which the others wait for. Without a plan: :attr:`dense`."""
        return max(self.workers, default=self.dense)

    @property
    def min(self) -> float:
        """The quickest worker's. Without a plan: :attr:`dense`."""
        return min(self.workers, default=self.dense)


@dataclass(frozen=True)
class _ModuleFlops:
    """Training FLOPs per token of an attention or MLP module, and what of them the gradient of its weights takes."""

    name: str
    total: float
    weight_gradient: float

    @classmethod
    def of(cls, model: nn.Module, module: PartitionedModule) -> "_ModuleFlops":
        space, at = module.space, module.positions
        parameters = dict(model.named_parameters())
        # Biases and norms are no matrix products.
        matrices = [
            parameters[t.name].numel() for t in module.tensors if t.name in parameters and parameters[t.name].dim() > 1
        ]
        attention = space.num_units * (space.unit_flops - matmul_flops(space.unit_numel, at))
        return cls(space.name, matmul_flops(sum(matrices), at) + attention, weight_gradient_flops(sum(matrices), at))


def flops_per_token(
    model: nn.Module, seq_length: int, sdp: SDPSource | None = None, plan: SubnetworkPlan | None = None
) -> FlopsPerToken:
    """Model FLOPs per token; see the module for what is in them. A pure function of shapes.

    Args:
        model: the full model, real or on the meta device; not one that is cut already.
        seq_length: tokens of a sequence, at which attention is counted.
        sdp: the SDP block, as ``initialize`` takes it; ``None`` or one that is not enabled: the full model alone.
        plan: who owns what; made from ``sdp`` if not given, which takes its ``num_subnetworks``. With a schedule of
            coverages that of its beginning; the result is the mean over the training.

    Raises:
        ConfigError: ``seq_length`` is no length, or there is neither a plan nor ``num_subnetworks``.
        ModelError: no adapter knows the model.
    """
    if seq_length < 1:
        raise ConfigError(f"seq_length: got {seq_length}; takes a number from 1 on")
    adapter = find_adapter(model)
    modules = [_ModuleFlops.of(model, m) for m in adapter.partitioned_modules(model, tuple(adapter.units), seq_length)]
    dense = _head_flops(model) + sum(module.total for module in modules)
    sdp = SDPConfig.of(sdp) if sdp is not None else None
    if sdp is None or not sdp.enabled:
        return FlopsPerToken(dense)
    if plan is None:
        if sdp.num_subnetworks is None:
            raise ConfigError("subnetwork_data_parallel.num_subnetworks: got none; takes the number of workers")
        plan = plan_for(model, sdp, sdp.num_subnetworks)
    stages = sdp.schedule.stages()
    if not stages:
        return FlopsPerToken(dense, _of_workers(plan, modules, sdp, dense))
    workers = [0.0] * plan.num_subnetworks
    for coverage, share in stages:
        at = sdp.model_copy(update={"coverage": coverage})
        of_stage = _of_workers(plan_for(model, at, plan.num_subnetworks), modules, at, dense)
        workers = [total + share * flops for total, flops in zip(workers, of_stage, strict=True)]
    return FlopsPerToken(dense, tuple(workers))


def _of_workers(
    plan: SubnetworkPlan, modules: Sequence[_ModuleFlops], sdp: SDPConfig, dense: float
) -> tuple[float, ...]:
    workers = [dense] * plan.num_subnetworks
    for planned in plan.spaces:
        name = planned.space.name
        inside = [module for module in modules if f"{module.name}.".startswith(f"{name}.")]
        # Whoever owns a unit, under backward masking all compute with it; its owners alone need its weights' gradient.
        owned = sum(m.weight_gradient if sdp.masking == "backward" else m.total for m in inside)
        for worker in range(plan.num_subnetworks):
            units = sum(chunk.stop - chunk.start for chunk in plan.owned(name, worker))
            workers[worker] -= owned * (1 - units / planned.space.num_units)
    return tuple(workers)


def _head_flops(model: nn.Module) -> float:
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return matmul_flops(head.weight.numel()) if head is not None else 0.0
