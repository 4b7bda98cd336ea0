"""The ZeRO optimizer over owner sets, for every stage: DeepSpeed's engine sees a ``ZeROOptimizer``.

A client's optimizer steps the fp32 master copy of this rank's shards (:mod:`deepspeed_sdp.engine.zero.owner_bucket`).
What differs between the stages is what is sharded and when gradients are reduced:

====== ============================== ===================================== =========================================
stage  state                          gradients                             weights
====== ============================== ===================================== =========================================
0      whole on every owner           reduced once per step                 whole
1      sharded over the owners        reduced once per step                 whole, gathered after the step
2      sharded                        reduced after every micro-batch       whole, gathered after the step
3      sharded                        reduced after every micro-batch       sharded, gathered where they are used
====== ============================== ===================================== =========================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.utils import count_used_parameters_in_backward
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.engine.comm.traffic import Traffic, all_reduce_bytes
from deepspeed_sdp.engine.comm.transport import Transport
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, Behaviour, constants, state_like
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.frozen import FrozenParameters
from deepspeed_sdp.engine.zero.local_gradients import LocalGradients
from deepspeed_sdp.engine.zero.nonfinite import NonFiniteGradients
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.zero.reducer import Reducer
from deepspeed_sdp.engine.zero.refresh import Portion, WeightRefresh
from deepspeed_sdp.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Dtypes of a gradient's way.

    Attributes:
        reduce: of the collectives.
        accumulate: in which the micro-batches of a step are summed.
    """

    reduce: torch.dtype
    accumulate: torch.dtype


class SDPOptimizer(ZeROOptimizer):  # type: ignore[misc]
    """See the module.

    Args:
        optimizer: the basic optimizer; its groups carry ``GROUP_KEY``, the index of the client's group, and its
            parameters are replaced by the master shards.
        behaviour: of ``optimizer``.
        rounds: this rank's buckets by round, with their parameters.
        parameters: of the buckets, by their index there.
        refresh: moves weights after the step.
        stage: of ZeRO.
        transport: of gradients.
        world: of all ranks, for the norm.
        device: of weights and gradients.
        precision: see :class:`Precision`.
        loss_scaler: DeepSpeed's.
        clip_grad: largest norm of the gradient, 0 for none.
        state_device: where the master weights and the optimizer's state live.
        nonfinite: what is done about NaN and Inf.
        frozen: which parameters a step passes over.
        untrained: parameters that get gradients but are in no group; the gradients are dropped.
        traffic: counts bytes sent.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        behaviour: Behaviour,
        rounds: Sequence[Sequence[OwnerBucket]],
        parameters: Mapping[int, nn.Parameter],
        refresh: WeightRefresh,
        *,
        stage: int,
        transport: Transport,
        world: Group,
        device: torch.device,
        precision: Precision,
        loss_scaler: Any,
        clip_grad: float,
        state_device: torch.device,
        nonfinite: NonFiniteGradients,
        frozen: FrozenParameters,
        untrained: Sequence[nn.Parameter],
        traffic: Traffic,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.behaviour = behaviour
        self.stage = stage
        self.partition_gradients = stage >= 2
        self.clip_grad = clip_grad
        self.loss_scaler = loss_scaler
        self.dynamic_loss_scale = loss_scaler.dynamic
        self.custom_loss_scaler = False
        self.external_loss_scale: float | None = None
        self.torch_autocast_gradscaler = None
        self.overflow = False
        self.synchronize_gradients = True
        self._world = world
        self._global_grad_norm: torch.Tensor | float = 0.0
        self.device = device
        self.refresh = refresh
        self._buckets = [bucket for buckets in rounds for bucket in buckets]
        self._precision = precision
        self._nonfinite = nonfinite
        self._frozen = frozen
        self._untrained = tuple(untrained)
        self._traffic = traffic
        self._local = LocalGradients(parameters, precision.accumulate)
        self._masters = {bucket: bucket.master(state_device) for bucket in self._buckets}
        self._replace_parameters()
        self.reducer = Reducer(rounds, transport, self._flatten, self._keep, is_eager=stage < 3)
        self._hooks = self._hook_gradients()

    def _replace_parameters(self) -> None:
        by_group: dict[int, list[nn.Parameter]] = {}
        for bucket, master in self._masters.items():
            by_group.setdefault(bucket.bucket.group, []).append(master)
        state = self.optimizer.state
        # What constructors make of it is the same for all parameters of a group.
        self._initial = {
            group[GROUP_KEY]: next((constants(state[p]) for p in group["params"] if state.get(p)), {})
            for group in self.optimizer.param_groups
        }
        for group in self.optimizer.param_groups:
            group["params"] = by_group.get(group[GROUP_KEY], [])
        self.reset_state()

    def reset_state(self) -> None:
        """The basic optimizer has not stepped yet."""
        self.optimizer.state.clear()
        for bucket, master in self._masters.items():
            if initial := self._initial[bucket.bucket.group]:
                self.optimizer.state[master].update(state_like(initial, master))

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _hook_gradients(self) -> list[Any]:
        trainable = list(self._local.parameters.values())

        def hook(index: int) -> Callable[[torch.Tensor], None]:
            def on_gradient(parameter: torch.Tensor) -> None:
                # DeepSpeed's own order of calls: it finds the end of a backward pass that it did not start itself.
                must_count = self.should_refresh_expected_hook_count()
                self.reenter_backward_if_needed()
                self._on_gradient(index)
                expected = count_used_parameters_in_backward(trainable) if must_count else self._max_expected_hooks_seen
                self.update_hook_state_and_maybe_run_epilogue(expected)

            return on_gradient

        return [
            parameter.register_post_accumulate_grad_hook(hook(index))  # type: ignore[no-untyped-call]
            for index, parameter in self._local.parameters.items()
        ]

    def _on_gradient(self, index: int) -> None:
        self._frozen.reach(index)
        self._local.add(index)
        if self.synchronize_gradients and (self.partition_gradients or self.is_gradient_accumulation_boundary()):
            self.reducer.ready(index)

    def _flatten(self, bucket: OwnerBucket) -> torch.Tensor:
        values = [self._local.take(index) for index in bucket.bucket.items]
        self._nonfinite.watch(bucket, values)
        return bucket.flatten(values, self._precision.reduce)

    def _keep(self, bucket: OwnerBucket, shard: torch.Tensor) -> None:
        bucket.add_average(shard, torch.promote_types(self._precision.accumulate, self._precision.reduce))

    def launch_before(self, round_: int) -> None:
        """The backward pass is past the rounds before ``round_``; launch them, unless gradients are only summed up."""
        if self.synchronize_gradients and (self.partition_gradients or self.is_gradient_accumulation_boundary()):
            self.reducer.launch_before(round_)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Finish the reduction of the current backward pass. Afterwards this rank holds its shard of the averages."""
        self.reducer.finish()
        self._epilogue_ran_this_backward = True

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """DeepSpeed's name for the same at stages 2 and 3."""
        self.reduce_gradients()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Nothing is deferred to the boundary."""

    def enter_backward(self) -> None:
        """Once per backward pass, through however many forward passes it goes."""
        state = self._backward_hook_state
        is_inside = self._backward_active_depth > 0 and state.post_backward_callback_queued
        if not is_inside or state.post_backward_callback_graph_task_id != torch._C._current_graph_task_id():
            super().enter_backward()

    def end_backward(self) -> None:
        """A second pass through the same graph, after ``autograd.grad`` too, has an end of its own."""
        self._backward_hook_state.post_backward_callback_queued = False

    def check_backward(self) -> None:
        """Between backward passes: whether the last one was whole.

        Raises:
            RuntimeError: it was not; gradients are half reduced, and other ranks may be gone.
        """
        self.reducer.check()
        if _in_backward():
            return
        if self._backward_active_depth > 0:
            raise RuntimeError(
                "the last backward pass ended early, by an exception inside loss.backward() or autograd.grad() that "
                "was caught; gradients are half reduced, and this engine cannot train on"
            )
        if self.reducer.is_half_way:
            raise RuntimeError(
                "gradients came by a backward pass that the engine did not see; takes a loss made by engine(...), or "
                "engine.backward(loss)"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient, averaged ones included."""
        self._local.clear()
        for parameter in self._untrained:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.average = None
        self._nonfinite.clear()
        self._frozen.clear()

    # -- norm and step -----------------------------------------------------------------------------------------------

    def scaled_global_norm(self) -> torch.Tensor:
        """``sqrt(Σ_u ‖g_u‖²)``, every unit once, still multiplied by the loss scale; the same tensor on every rank."""
        squares = [torch.zeros((), dtype=torch.float64, device=self.device)]
        for bucket in self._buckets:
            # At stage 0 every owner holds the whole bucket: the first one counts it.
            is_counted = self.stage > 0 or bucket.owners.ranks[0] == dist.get_rank()
            if is_counted and bucket.average is not None:
                squares.append(torch.linalg.vector_norm(bucket.average, dtype=torch.float32).double() ** 2)
        # Beside it, how many ranks have frozen or unfrozen parameters since the last step.
        changed = torch.tensor(float(self._frozen.have_changed()), dtype=torch.float64, device=self.device)
        total = torch.stack([torch.stack(squares).sum(), changed])
        self._traffic.add("norm_all_reduce", all_reduce_bytes(16, dist.get_world_size()))
        with self._world.waiting("the norm of the gradient") as group:
            dist.all_reduce(total, group=group)
        if float(total[1]):
            self._frozen.agree()
        return total[0].sqrt()

    def step(self, closure: Any = None) -> None:
        """Clip, step the master shards, and send the new weights. Skips on NaN and Inf, on all ranks."""
        assert closure is None, "a closure cannot be combined with ZeRO"
        self.check_backward()
        self.refresh.settle()
        norm = float(self.scaled_global_norm())
        scale = float(self.loss_scale)
        self.overflow = not _is_finite(norm)
        self._global_grad_norm = norm / scale if not self.overflow else norm
        try:
            if self.overflow:
                self._nonfinite.handle(scale, self.dynamic_loss_scale)
            else:
                self._nonfinite.reset()
                self._apply(self._combined_scale(norm, scale))
        finally:
            self.zero_grad()
            self._traffic.end_step()
        self.loss_scaler.update_scale(self.overflow)

    def _combined_scale(self, norm: float, scale: float) -> float:
        """What the averages are divided by: the loss scale, and what clipping asks for (DeepSpeed's formula)."""
        clip = (norm / scale + 1e-6) / self.clip_grad if self.clip_grad > 0.0 else 0.0
        return scale * max(clip, 1.0)

    def _apply(self, divisor: float) -> None:
        portions = self.refresh.portions
        if not self.behaviour.steps_by_parts:
            self._step_part(self._buckets, divisor)
        for index, portion in enumerate(portions):
            if self.behaviour.steps_by_parts:
                self._step_portion(portion, divisor)
            self.refresh.issue(index)

    def _step_portion(self, portion: Portion, divisor: float) -> None:
        # Round by round: gradients are needed in the master's dtype, and never all at once.
        for buckets in filter(None, portion.owned):
            self._step_part(buckets, divisor)

    @torch.no_grad()
    def _step_part(self, part: Sequence[OwnerBucket], divisor: float) -> None:
        for bucket in part:
            master = self._masters[bucket]
            average, bucket.average = bucket.average, None
            gradient = torch.zeros_like(master) if average is None else average.to(master.device, master.dtype)
            master.grad = gradient.div_(divisor) if divisor != 1.0 else gradient
        with self._frozen.kept(part, self.tensors_of):
            self.optimizer.step()  # passes over parameters without a gradient
        self._share_counts(part)
        for bucket in part:
            self._masters[bucket].grad = None
            bucket.store(self._masters[bucket].data)

    def _share_counts(self, part: Sequence[OwnerBucket]) -> None:
        """DeepSpeed's fused optimizers count a call of ``step`` on the last parameter of each group alone."""
        counted: dict[int, list[dict[str, Any]]] = {}
        for bucket in part:
            state = self.optimizer.state.get(self._masters[bucket], {})
            if isinstance(state.get("step"), int):
                counted.setdefault(bucket.bucket.group, []).append(state)
        for states in counted.values():
            steps = max(state["step"] for state in states)
            for state in states:
                state["step"] = steps

    # -- what DeepSpeed's engine and its users ask for ----------------------------------------------------------------

    @property
    def dp_process_group(self) -> dist.ProcessGroup:
        """Of all ranks; DeepSpeed's name for it."""
        return self._world.handle

    @property
    def parameters(self) -> Mapping[int, nn.Parameter]:
        """Parameters of the subnetwork, by their index in the buckets."""
        return self._local.parameters

    @property
    def masters(self) -> Mapping[OwnerBucket, nn.Parameter]:
        """The master weights ``[shard_numel]`` of this rank's shard of each bucket."""
        return self._masters

    def tensors_of(self, bucket: OwnerBucket) -> dict[str, torch.Tensor]:
        """Master weights and optimizer state ``[shard_numel]`` of a bucket: ``"master"``, ``"optimizer.<key>"``."""
        master = self._masters[bucket]
        state = self.optimizer.state.get(master, {})
        found = {f"optimizer.{k}": v for k, v in sorted(state.items()) if getattr(v, "shape", None) == master.shape}
        return {"master": master.data, **found}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The client's groups, with master shards as parameters."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:
        """State of the basic optimizer, by master shard."""
        return self.optimizer.state

    @property
    def loss_scale(self) -> float:
        """The factor on the loss of the current step."""
        return self.external_loss_scale if self.custom_loss_scaler else self.loss_scaler.cur_scale  # type: ignore[return-value]

    @property
    def cur_scale(self) -> float:
        """DeepSpeed's other name for it."""
        return self.loss_scale

    def override_loss_scale(self, loss_scale: float) -> None:
        """Scale the loss from outside."""
        self.custom_loss_scaler = True
        self.external_loss_scale = loss_scale

    def state_dict(self) -> NoReturn:
        """Not available.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("optimizer.state_dict: not available with SDP in this version")

    def load_state_dict(self, state_dict: Any) -> NoReturn:
        """Not available.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("optimizer.load_state_dict: not available with SDP in this version")

    def fail(self, error: BaseException) -> None:
        """A pass ended early: other ranks may be gone, and nothing is waited for any more."""
        self.reducer.fail(error)
        self.refresh.fail(error)

    def destroy(self) -> None:
        """Let go of the parameters, whose hooks are taken off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.zero_grad()
        self.refresh.close()

    # -- measurement -------------------------------------------------------------------------------------------------

    def weight_tensors(self) -> list[torch.Tensor]:
        """Weights that are held beside those of the parameters."""
        return [bucket.shard for bucket in self._buckets if isinstance(bucket, FlatBucket)]

    def gradient_tensors(self) -> list[torch.Tensor]:
        """Every live tensor that holds gradients beside those of the parameters."""
        averages = [bucket.average for bucket in self._buckets if bucket.average is not None]
        return [*self._local.tensors(), *averages]

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of buffers under way, of gradients and of weights."""
        return self.reducer.in_flight_bytes + self.refresh.in_flight_bytes


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_finite(value: float) -> bool:
    return value - value == 0.0
