"""The ZeRO optimizer over owner sets, for every stage: DeepSpeed's engine sees a ``ZeROOptimizer``.

A client's optimizer steps the fp32 master copy of this rank's shards (:mod:`deepspeed_sdp.engine.zero.owner_bucket`).
docs/architecture.md says what differs between the stages.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.utils import count_used_parameters_in_backward
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.engine.comm.timing import named
from deepspeed_sdp.engine.comm.traffic import Traffic, all_reduce_bytes
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, Behaviour, constants, state_like
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.frozen import FrozenParameters
from deepspeed_sdp.engine.zero.gradients import GradientPath
from deepspeed_sdp.engine.zero.host_copies import HostCopies
from deepspeed_sdp.engine.zero.nonfinite import NonFiniteGradients
from deepspeed_sdp.engine.zero.own_state import own_state, take_own_state
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.engine.zero.refresh import WeightRefresh

_KEPT = (
    "loss_scaler", "custom_loss_scaler", "external_loss_scale", "torch_autocast_gradscaler", "overflow",
    "_global_grad_norm",
)  # fmt: skip


class SDPOptimizer(ZeROOptimizer):  # type: ignore[misc]
    """See the module.

    Args:
        optimizer: the basic optimizer; its groups carry ``GROUP_KEY``, the index of the client's group, and its
            parameters are replaced by the master shards.
        behaviour: of ``optimizer``.
        gradients: their way, to the averages of this rank's shards.
        refresh: moves weights after the step.
        everywhere: moves them to all who compute with them.
        stage: of ZeRO.
        world: of all ranks.
        norm_levels: over which the norm is summed: all ranks, or where workers train apart the replicas of one.
        device: of weights and gradients.
        loss_scaler: DeepSpeed's.
        clip_grad: largest norm of the gradient, 0 for none.
        state_device: where the master weights and the optimizer's state live.
        host_copies: makes, for that many elements of the largest part, what copies gradients to the host and weights
            from it, where the state is offloaded.
        nonfinite: what is done about NaN and Inf.
        frozen: which parameters a step passes over.
        identity: differs where the parameters in the buckets do.
        traffic: counts bytes sent.
        is_apart: whether workers train apart (local steps): steps, norms and what is skipped are each worker's own.
        initial: by the client's group, what constructors make of a parameter's state; default: what there is of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        behaviour: Behaviour,
        gradients: GradientPath,
        refresh: WeightRefresh,
        everywhere: WeightRefresh,
        *,
        stage: int,
        world: Group,
        norm_levels: Sequence[Group],
        device: torch.device,
        loss_scaler: Any,
        clip_grad: float,
        state_device: torch.device,
        host_copies: Callable[[int], HostCopies] | None,
        nonfinite: NonFiniteGradients,
        frozen: FrozenParameters,
        identity: str,
        traffic: Traffic,
        is_apart: bool = False,
        initial: Mapping[int, Mapping[str, Any]] | None = None,
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
        self._world, self._norm_levels = world, norm_levels
        self._global_grad_norm: torch.Tensor | float = 0.0
        self.device = device
        self.refresh, self.everywhere = refresh, everywhere
        self.identity = identity
        self.is_apart = is_apart
        self.gradients = gradients
        self._buckets = gradients.buckets
        self._nonfinite = nonfinite
        self._frozen = frozen
        self._traffic = traffic
        self._masters = {bucket: bucket.master(state_device) for bucket in self._buckets}
        # What is stepped in one call, before each of the portions is sent.
        self._parts = [[b for of_round in portion.owned for b in of_round] for portion in refresh.portions]
        if not behaviour.steps_by_parts:
            self._parts = [self._buckets, *([] for _ in self._parts[1:])]
        largest = max(sum(bucket.shard_numel for bucket in part) for part in self._parts)
        self._host = None if host_copies is None else host_copies(largest)
        self._replace_parameters(initial)
        self._hooks = self._hook_gradients()

    def _replace_parameters(self, initial: Mapping[int, Mapping[str, Any]] | None) -> None:
        state = self.optimizer.state
        # What constructors make of it is the same for all parameters of a group.
        self._initial = initial or {
            group[GROUP_KEY]: next((constants(state[p]) for p in group["params"] if state.get(p)), {})
            for group in self.optimizer.param_groups
        }
        self._give(self._buckets)
        self.reset_state()

    def _give(self, part: Sequence[OwnerBucket]) -> None:
        """Let the optimizer's groups have the master shards of ``part``."""
        for group in self.optimizer.param_groups:
            group["params"] = [self._masters[b] for b in part if b.client_group == group[GROUP_KEY]]

    def reset_state(self) -> None:
        """The basic optimizer has not stepped yet."""
        self.optimizer.state.clear()
        for bucket, master in self._masters.items():
            if initial := self._initial[bucket.client_group]:
                self.optimizer.state[master].update(state_like(initial, master))

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _hook_gradients(self) -> list[Any]:
        trainable = list(self.gradients.parameters.values())

        def hook(index: int) -> Callable[[torch.Tensor], None]:
            def on_gradient(parameter: torch.Tensor) -> None:
                # DeepSpeed's own order of calls: it finds the end of a backward pass that it did not start itself.
                must_count = self.should_refresh_expected_hook_count()
                self.reenter_backward_if_needed()
                self.gradients.add(index)
                if self._is_reducing:
                    self.gradients.ready(index)
                expected = count_used_parameters_in_backward(trainable) if must_count else self._max_expected_hooks_seen
                self.update_hook_state_and_maybe_run_epilogue(expected)

            return on_gradient

        return [
            parameter.register_post_accumulate_grad_hook(hook(index))  # type: ignore[no-untyped-call]
            for index, parameter in self.gradients.parameters.items()
        ]

    @property
    def _is_reducing(self) -> bool:
        """Whether the gradients of this backward pass are averaged, and not only summed up."""
        return self.synchronize_gradients and (self.partition_gradients or self.is_gradient_accumulation_boundary())

    def launch_before(self, round_: int) -> None:
        """The backward pass is past the rounds before ``round_``; launch them, unless gradients are only summed up."""
        if self._is_reducing:
            self.gradients.launch_before(round_)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Finish the reduction of the current backward pass. Afterwards this rank holds its shard of the averages."""
        self.gradients.finish()
        self._epilogue_ran_this_backward = True

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
        self.gradients.check()
        if _in_backward():
            return
        if self._backward_active_depth > 0:
            raise RuntimeError(
                "the last backward pass ended early, by an exception inside loss.backward() or autograd.grad() that "
                "was caught; gradients are half reduced, and this engine cannot train on"
            )
        if self.gradients.is_half_way:
            raise RuntimeError(
                "gradients came by a backward pass that the engine did not see; takes a loss made by engine(...), or "
                "engine.backward(loss)"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient, averaged ones included."""
        self.gradients.clear()

    # -- norm and step -----------------------------------------------------------------------------------------------

    def step(self, closure: Any = None) -> None:
        """Clip, step the master shards, and send the new weights. Skips on NaN and Inf, on all ranks."""
        assert closure is None, "a closure cannot be combined with ZeRO"
        self.check_backward()
        self.refresh.settle()
        with named("norm"):
            norm, scale = self._scaled_global_norm(), float(self.loss_scale)
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = norm / scale if not self.overflow else norm
        try:
            if self.overflow:
                self._nonfinite.handle(self.gradients.first_nonfinite(), scale, self.dynamic_loss_scale)
            else:
                self._nonfinite.reset()
                # DeepSpeed's formula of clipping.
                clip = (norm / scale + 1e-6) / self.clip_grad if self.clip_grad > 0.0 else 0.0
                self._apply(scale * max(clip, 1.0))
        finally:
            self.zero_grad()
            self._traffic.end_step()
        self.loss_scaler.update_scale(self.overflow)

    def _scaled_global_norm(self) -> float:
        """``sqrt(Σ_u ‖g_u‖²)``, every unit once, still multiplied by the loss scale; the same number on every rank.

        Where workers train apart it is that of one worker's units.

        Summed on the device. The host reads the result once: it says whether there is a step at all.
        """
        rank = dist.get_rank()
        # At stage 0 every owner holds the whole bucket: the first one counts it.
        averages = self.gradients.averages.items()
        counted = [average for bucket, average in averages if self.stage > 0 or bucket.owners.sharers.ranks[0] == rank]
        norms = torch._foreach_norm(counted, dtype=torch.float32) if counted else ()
        nothing = torch.zeros((), dtype=torch.float32, device=self.device)
        # A kernel for all of them, and not some for each.
        square = torch.stack([nothing, *norms]).double().square().sum()
        # Beside it, how many ranks have frozen or unfrozen parameters since the last step.
        changed = torch.full_like(square, self._frozen.have_changed(self.gradients.reached))
        total = torch.stack([square, changed])
        for level in self._norm_levels:
            self._traffic.add("norm_all_reduce", all_reduce_bytes(16, len(level.ranks)))
            with level.waiting("the norm of the gradient") as group:
                dist.all_reduce(total, group=group)
        of_all, changes = total.tolist()
        if changes:
            self._frozen.agree()
        return math.sqrt(of_all)

    @torch.no_grad()
    def _apply(self, divisor: float) -> None:
        """Step part by part; the weights of a portion travel while the next one is stepped."""
        gradients: Iterable[list[torch.Tensor]] = (self._divided(part, divisor) for part in self._parts)
        if self._host is not None:
            gradients = self._host.fetched(gradients)
        try:
            for index, (part, of_part) in enumerate(zip(self._parts, gradients, strict=True)):
                if part:
                    self._step_part(part, of_part)
                self.refresh.issue(index)
        finally:
            self._give(self._buckets)

    def _divided(self, part: Sequence[OwnerBucket], divisor: float) -> list[torch.Tensor]:
        """Takes the averages of ``part``, in fp32."""
        gradients = []
        for bucket in part:
            average = self.gradients.averages.pop(bucket, None)
            gradients.append(
                torch.zeros(bucket.shard_numel, device=self.device) if average is None else average.float()
            )
        if gradients and divisor != 1.0:
            torch._foreach_div_(gradients, divisor)
        return gradients

    def _step_part(self, part: Sequence[OwnerBucket], gradients: list[torch.Tensor]) -> None:
        masters = [self._masters[bucket] for bucket in part]
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        self._give(part)  # it looks at all parameters of its groups in every call
        with self._frozen.kept(part, self.tensors_of), named("optimizer"):
            self.optimizer.step()
        self._share_counts(part)
        gradients.clear()
        for master in masters:
            master.grad = None
        self._store(part)

    @torch.no_grad()
    def store_masters(self, buckets: Iterable[OwnerBucket] | None = None) -> None:
        """Write the master weights of ``buckets``, or all, back into this rank's shards of the weights."""
        for part in self._parts if buckets is None else [[bucket] for bucket in buckets]:
            self._store(part)

    def _store(self, part: Sequence[OwnerBucket]) -> None:
        pairs = [pair for bucket in part for pair in bucket.places(self._masters[bucket].data)]
        weights, values = [to for to, _ in pairs], [value for _, value in pairs]
        if self._host is not None and self._host.sends:
            self._host.send(weights, values)
        elif pairs:
            # To a shard that rests on the host: the gather that reads it comes later on the same stream.
            torch._foreach_copy_(weights, values, non_blocking=True)

    def spread(self) -> None:
        """Collective. The master weights are new: bring them to all who compute with them."""
        self.store_masters()
        self.everywhere.send_all()

    def _share_counts(self, part: Sequence[OwnerBucket]) -> None:
        """DeepSpeed's fused optimizers count a call of ``step`` on the last parameter of each group alone."""
        counted: dict[int, list[dict[str, Any]]] = {}
        for bucket in part:
            state = self.optimizer.state.get(self._masters[bucket], {})
            if isinstance(state.get("step"), int):
                counted.setdefault(bucket.client_group, []).append(state)
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
        return self.gradients.parameters

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

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, for :meth:`load_state_dict` on this rank in the same layout; no copies."""
        return own_state(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Collective. Go on from what :meth:`state_dict` gave, to the bit.

        Raises:
            CheckpointError: it is of another rank or layout; on every rank.
        """
        take_own_state(self, state_dict)

    def fail(self, error: BaseException) -> None:
        """A pass ended early: other ranks may be gone, and nothing is waited for any more."""
        self.gradients.fail(error)
        self.refresh.fail(error)

    def renew(self, *args: Any, **kwargs: Any) -> "SDPOptimizer":
        """Be what the constructor makes of the arguments, with the loss scale and what the last step said kept.

        Who holds the optimizer, as a scheduler or a trainer, holds it still. :meth:`destroy` comes before.
        """
        kept = {name: getattr(self, name) for name in _KEPT}
        self.__init__(*args, initial=self._initial, **kwargs)  # type: ignore[misc]
        self.__dict__.update(kept)
        return self

    def forget(self) -> None:
        """Let go of master shards and buckets too: what comes next is :meth:`renew`."""
        self._masters, self._buckets, self._parts = {}, [], []
        self.gradients = self.refresh = self.everywhere = self._frozen = self._nonfinite = self._host = None  # type: ignore[assignment]

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
        return self.gradients.tensors()

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of buffers under way, of gradients and of weights."""
        return self.gradients.in_flight_bytes + self.refresh.in_flight_bytes


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
