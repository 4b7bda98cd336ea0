"""DeepSpeed's ZeRO-1/2 optimizer, with one parameter group per owner set and a reducer of its own.

ZeRO keeps the sharding: every group is flattened, split over its owners, stepped and gathered by DeepSpeed's code. This
class replaces what that code does wrong for owner sets (docs/architecture.md): how gradients are reduced, and the norm.
Stage 0 is the same with a partition group of one rank: gradients are averaged over the owners, the state is whole.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from deepspeed_sdp.engine.buckets import BucketItem, make_buckets
from deepspeed_sdp.engine.groups import OwnerGroups
from deepspeed_sdp.engine.reducer import Reducer
from deepspeed_sdp.engine.traffic import Traffic, all_gather_bytes, all_reduce_bytes

OWNER_SET_KEY = "sdp_owner_set"


@dataclass(frozen=True)
class OwnedParameters:
    """What the optimizer must know about parameters beyond their values.

    Attributes:
        owner_set: owner set of each parameter, by ``id``.
        position: place in the full model in forward order, by ``id``; equal on all ranks for the same parameter.
    """

    owner_set: dict[int, int]
    position: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class _Shard:
    """What this rank's partition holds of one gradient: ``numel`` elements from ``source`` in it, at ``target``."""

    group: int
    source: int
    target: int
    numel: int


class SDPZeroOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """ZeRO 0, 1 and 2 over owner sets. See the module.

    Args:
        owned: owner set and position of every parameter.
        groups: process groups of the owner sets.
        traffic: counts bytes sent.
        partition_states: ``False`` for stage 0.
    """

    def __init__(
        self,
        init_optimizer: torch.optim.Optimizer,
        param_names: dict[nn.Parameter, str],
        *,
        owned: OwnedParameters,
        groups: OwnerGroups,
        traffic: Traffic,
        partition_states: bool,
        **kwargs: Any,
    ) -> None:
        self._owned = owned
        self._owner_groups = groups
        self._traffic = traffic
        self._partition_states = partition_states
        self.synchronize_gradients = True
        # Group i is an "expert group" to DeepSpeed; that is the way to give it a process group of its own.
        super().__init__(
            init_optimizer,
            param_names,
            has_moe_layers=True,
            expert_parallel_group={},
            expert_data_parallel_group={},
            **kwargs,
        )
        self._parameters = [parameter for group in self.bit16_groups for parameter in group]
        self._index = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._shards = self._find_shards()
        self._reducer = self._make_reducer()

    def _configure_moe_settings(self) -> None:
        sets = [group[OWNER_SET_KEY] for group in self.optimizer.param_groups]
        for i, owner_set in enumerate(sets):
            partition = self._owner_groups.group(owner_set) if self._partition_states else self._owner_groups.own
            self.real_dp_process_group[i] = partition
            self.partition_count[i] = dist.get_world_size(partition)
        self.is_moe_param_group = [True] * len(sets)

    def initialize_optimizer_states(self) -> None:
        for i, master in enumerate(self.single_partition_of_fp32_groups):
            weights = self.parallel_partitioned_bit16_groups[i][dist.get_rank(self.real_dp_process_group[i])]
            if weights.dtype == master.dtype and weights.device == master.device:
                # fp32 training: the weights are their own master copy, a second one would only cost memory.
                master.data = weights.data
        super().initialize_optimizer_states()

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        # DeepSpeed's name for: averaged gradients live in one flat tensor per group, in the accumulation dtype.
        return True

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Hook: ``param.grad`` holds this micro-batch's gradient (and, at stages 0 and 1, those before it)."""
        if self.use_grad_accum_attribute:
            self._fill_param_grad_accum_attribute(param)
        if self.synchronize_gradients and (self.partition_gradients or self.is_gradient_accumulation_boundary()):
            self._reducer.ready(self._index[id(param)])

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Finish the reduction of the current backward pass. Afterwards this rank holds its shard of the averages."""
        self._reducer.finish()
        self._epilogue_ran_this_backward = True

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        self.reduce_gradients()

    def _make_reducer(self) -> Reducer:
        items = (
            BucketItem(self._owned.position[id(p)], self._owned.owner_set[id(p)], p.numel(), index)
            for index, p in enumerate(self._parameters)
        )
        return Reducer(
            make_buckets(items, self.reduce_bucket_size),
            self._owner_groups,
            self._local_gradient,
            self._keep_shard,
            self.communication_data_type,
            self._traffic,
        )

    def _local_gradient(self, index: int) -> torch.Tensor:
        parameter = self._parameters[index]
        grad = self.get_gradient_for_reduction(parameter)
        if grad is None:
            dtype = self.gradient_accumulation_dtype if self.use_grad_accum_attribute else parameter.dtype
            return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        assert isinstance(grad, torch.Tensor)
        return grad.detach()

    def _keep_shard(self, index: int, average: torch.Tensor) -> None:
        shard = self._shards[index]
        if shard is not None:
            flat = self._get_compact_grad_partition_buffer(shard.group).flat_partition
            flat.narrow(0, shard.target, shard.numel).add_(average.narrow(0, shard.source, shard.numel))
        self.clear_grad_attribute(self._parameters[index])

    def _find_shards(self) -> list[_Shard | None]:
        shards: list[_Shard | None] = []
        for i, group in enumerate(self.bit16_groups):
            partition = dist.get_rank(self.real_dp_process_group[i])
            for parameter in group:
                param_id = self.get_param_id(parameter)
                source = self.grad_start_offset[i][partition].get(param_id)
                if source is None:
                    shards.append(None)
                    continue
                target = int(self.grad_partition_insertion_offset[i][partition][param_id])
                numel = min(parameter.numel() - int(source), int(self.partition_size[i]) - target)
                shards.append(_Shard(i, int(source), target, numel))
        return shards

    # -- norm and step -----------------------------------------------------------------------------------------------

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        """``sqrt(Σ_u ‖g_u‖²)``, every unit once, still multiplied by the loss scale; the same tensor on every rank.

        A NaN or Inf anywhere gives -1 on every rank, DeepSpeed's mark of an invalid norm.
        """
        assert norm_type == 2
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, group in enumerate(self.optimizer.param_groups):
            owners = self._owner_groups.ranks(group[OWNER_SET_KEY])
            # At stage 0 every owner holds the whole group: the first one counts it.
            if self._partition_states or owners[0] == self._owner_groups.rank:
                flat = self._get_compact_grad_partition_buffer(i).flat_partition
                total += torch.linalg.vector_norm(flat, dtype=torch.float32).double() ** 2
        self._traffic.add("norm_all_reduce", all_reduce_bytes(8, dist.get_world_size()))
        dist.all_reduce(total)
        norm = total.sqrt().float()
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if not self.overflow and self._partition_states:
            for flat, group in zip(self.bit16_groups_flat, self.real_dp_process_group, strict=True):
                nbytes = flat.numel() * flat.element_size()
                self._traffic.add("weight_all_gather", all_gather_bytes(nbytes, dist.get_world_size(group)))
        self._traffic.end_step()

    # -- measurement -------------------------------------------------------------------------------------------------

    def gradient_tensors(self) -> list[torch.Tensor]:
        """Every live tensor that holds gradients, this rank's flat averages included."""
        tensors = []
        for parameter in self._parameters:
            tensors += [t for t in (parameter.grad, getattr(parameter, "grad_accum", None)) if t is not None]
        for grads in self.averaged_gradients.values():
            if grads is not None:
                tensors.append(grads.flat_partition)
        return tensors

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of gradient buckets under way."""
        return self._reducer.in_flight_bytes
