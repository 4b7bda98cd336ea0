"""A DeepSpeed engine that trains one subnetwork per worker."""

import functools
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

from deepspeed_sdp.agreement import agree, agreed
from deepspeed_sdp.checkpoint import BackgroundWriter, FolderLocks
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.description import describe_scheduler
from deepspeed_sdp.engine.comm.mesh import OwnerGroups, Owners
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.deepspeed.param_groups import as_groups, translate_groups, translate_optimizer
from deepspeed_sdp.engine.deepspeed.settings import Settings
from deepspeed_sdp.engine.full.face import FullModelFace
from deepspeed_sdp.engine.lifetime import while_alive
from deepspeed_sdp.engine.state.consistency import check_owners
from deepspeed_sdp.engine.state.face import CheckpointFace
from deepspeed_sdp.engine.state.local_steps import LocalStepsFace
from deepspeed_sdp.engine.state.repartition import Moments, changed, repartition
from deepspeed_sdp.engine.state.schedule import check_schedule, follow_schedule
from deepspeed_sdp.engine.zero.build import Parts, assemble
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import ClientMap, Subnetwork


class SDPEngine(FullModelFace, CheckpointFace, LocalStepsFace, DeepSpeedEngine):  # type: ignore[misc]
    """``DeepSpeedEngine`` with the plan, the full model's face, and gradients averaged over owners.

    Built by :func:`deepspeed_sdp.initialize`. Everything that ``DeepSpeedEngine`` offers keeps its meaning.
    """

    def __init__(
        self,
        *args: Any,
        sdp_config: SDPConfig,
        subnetwork: Subnetwork,
        groups: OwnerGroups,
        client: ClientMap,
        agreed_weights: bool,
        **kwargs: Any,
    ) -> None:
        # nn.Module.__init__ has not run yet, and DeepSpeed's __getattr__ needs it: straight into __dict__.
        self.__dict__.update(
            sdp_config=sdp_config,
            _subnetwork=subnetwork,
            _owner_groups=groups,
            _meshes={groups.identity: groups},
            # Of the schedule: coverage and round now, and by coverage the plans of round 0.
            _scheduled_at=(sdp_config.schedule.coverage_at(0), 0),
            _scheduled_plans={sdp_config.schedule.coverage_at(0): subnetwork.plan},
            _agreed_weights=agreed_weights,
            _agreed_at=0,
            _is_agreeing=False,
            _traffic=Traffic(recent=deque(maxlen=sdp_config.schedule.sync_interval)),
            _stopwatch=Stopwatch(),
            _client=client,
            _parts=None,
            _is_destroyed=False,
            full_scale=1.0,
            _checkpoint_writer=BackgroundWriter(),
            _checkpoint_locks=FolderLocks(),
        )
        try:
            super().__init__(*args, **kwargs)
            # One that a callable made is compared here for the first time.
            agree(lambda: describe_scheduler(self.lr_scheduler))
            check_schedule(self)
        except BaseException:
            # Whoever is refused gets a plain module back. DeepSpeed's part asks for what it may not have made yet.
            with suppress(AttributeError):
                self.destroy()
            raise
        del self._client

    # -- other plans ------------------------------------------------------------------------------------------------

    @while_alive
    def repartition(
        self,
        plan: SubnetworkPlan | None = None,
        sdp_config: Mapping[str, Any] | None = None,
        *,
        moments: Moments = "move",
    ) -> None:
        """Collective, between steps. Train the subnetworks of another plan from now on.

        The full model does not change, to the bit; what the optimizer remembers of a unit goes to its new owners. Step
        counts, schedulers, groups and the loss scale go on. Modules inside the model, and their parameters, are other
        objects afterwards; hooks on those that are still there stay.

        Args:
            plan: of the same model, for a number of workers that divides the world; default: the one that the block
                asks for.
            sdp_config: keys of the SDP block that change with it, such as ``{"coverage": "1/4"}``, ``"masking"`` or
                ``"granularity"``; nested as there.
            moments: ``"reset"``: the optimizer begins anew.

        Raises:
            StateError: in the middle of a step.
            ConfigError, PlanError, ModelError: the block or the plan does not fit, or there is no memory for it; on
                every rank, before anything is moved.
        """
        sdp = agreed(lambda: changed(self.sdp_config, sdp_config or {}))
        repartition(self, plan, sdp, moments)

    # -- time -------------------------------------------------------------------------------------------------------

    @while_alive
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            self.optimizer.check_backward()
        with self._stopwatch.phase("forward"):
            return super().forward(*inputs, **kwargs)

    @while_alive
    def backward(self, *args: Any, **kwargs: Any) -> Any:
        # Also where the forward pass went around this engine's.
        self._tell_boundary()
        try:
            with self._stopwatch.phase("backward"):
                return super().backward(*args, **kwargs)
        except BaseException as error:
            self.optimizer.fail(error)
            raise

    @while_alive
    def step(self, *args: Any, **kwargs: Any) -> None:
        steps = self.global_steps
        with self._stopwatch.phase("step"):
            if self.is_gradient_accumulation_boundary() or not self.managed_gradient_accumulation():
                self._check_owners(steps + 1)
            super().step(*args, **kwargs)
        if self.global_steps > steps:
            self._agree_as_scheduled()
            self._stopwatch.end_step()
            self._write_figures()
            follow_schedule(self, self.global_steps)

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Time of the last step's phases and of its communication."""
        return self._stopwatch.last_step_seconds

    @property
    def bytes_sent(self) -> int:
        """By this rank in the last step."""
        return self._traffic.last_step_bytes

    def _write_figures(self) -> None:
        """The step's norm, traffic and communication to DeepSpeed's monitor, beside its own figures."""
        if not self.monitor.enabled or self.global_rank != 0:
            return
        seconds = self._stopwatch.last_step_seconds
        figures = {
            "grad_norm": float(self.get_global_grad_norm()),
            "bytes_sent": self._traffic.last_step_bytes,
            "communication_ms": 1e3 * seconds["communication"],
            "exposed_communication_ms": 1e3 * seconds["exposed"],
        }
        self.monitor.write_events(
            [(f"Train/SDP/{name}", value, self.global_samples) for name, value in figures.items()]
        )

    def _check_owners(self, step: int) -> None:
        """Before the update, which at stages 1 and 2 replaces what is not of one's own shard."""
        interval = self.sdp_config.comm.consistency_check_interval
        # At stage 3 there is one copy of every weight.
        if interval and step % interval == 0 and self.zero_optimization_stage() < 3:
            self.optimizer.refresh.settle()
            check_owners(self._subnetwork, step)

    def destroy(self) -> None:
        """Let go of all that the engine holds; its model is a plain module again. A second call does nothing.

        Afterwards the engine takes no calls. At ZeRO stage 3 the weights are gone with it: save them before.
        """
        # Python's end of an engine that was never built comes here too.
        if self.__dict__.get("_is_destroyed", True):
            return
        self.__dict__["_is_destroyed"] = True
        with ExitStack() as stack:
            parts: Parts | None = self._parts
            for groups in self._meshes.values():
                stack.callback(groups.destroy)
            if parts is not None:
                stack.callback(parts.close)
            for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
                if self.__dict__.get(hook) is not None:
                    stack.callback(self.__dict__.pop(hook).remove)
            stack.callback(super().destroy)
            stack.callback(self._checkpoint_locks.release)
            self.wait_for_checkpoint()

    # -- what DeepSpeed's engine asks for ----------------------------------------------------------------------------

    def _broadcast_model(self) -> None:
        """Make owners agree: every parameter from the first worker that owns it, buffers from the first of all.

        A worker's first rank tells its replicas; then, at each of their coordinates, the first worker tells the others.

        Skipped where they agree by construction (built on the meta device from per-unit seeds).
        """
        if self._agreed_weights:
            return
        subnetwork, everyone = self._subnetwork, self._owner_groups.for_weights
        positions, parameters = subnetwork.positions(), dict(subnetwork.module.named_parameters())
        for name in sorted(parameters, key=lambda name: (positions[name], subnetwork.owner_set(name))):
            if subnetwork.masking == "forward":
                _from_first(parameters[name].data, self._owner_groups.owners(subnetwork.owner_set(name)))
            elif name not in subnetwork.views:
                _from_first(parameters[name].data, everyone)
        for buffer in subnetwork.module.buffers():
            _from_first(buffer, everyone)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        if self.zero_optimization():
            super()._do_optimizer_sanity_check(basic_optimizer)
        # One optimizer wrapper for stages 0, 1 and 2 and for fp32 and bf16.
        return ZERO_OPTIMIZATION  # type: ignore[no-any-return]

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        if isinstance(client_optimizer, torch.optim.Optimizer):
            self._remember_groups(client_optimizer)
        elif client_optimizer is not None:
            client_optimizer = functools.partial(self._build_optimizer, client_optimizer)
        super()._configure_optimizer(client_optimizer, model_parameters)

    def _build_optimizer(self, build: Callable[[Any], torch.optim.Optimizer], parameters: Any) -> torch.optim.Optimizer:
        def translated() -> torch.optim.Optimizer:
            optimizer = build(parameters)
            translate_optimizer(optimizer, self._subnetwork, self._client)
            return optimizer

        return self._remember_groups(agreed(translated))

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        groups = translate_groups(as_groups(model_parameters), self._subnetwork, self._client)
        return self._remember_groups(super()._configure_basic_optimizer(groups))

    def _remember_groups(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        # DeepSpeed drops groups of which this rank owns nothing; a scheduler counts them.
        self._client_groups = list(optimizer.param_groups)
        return optimizer

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> SDPOptimizer:
        optimizer.param_groups[:] = self._client_groups
        settings, group_of = Settings.of(self, self.sdp_config), self._client.group_of
        parts = assemble(
            settings, optimizer, self._subnetwork, group_of, self._owner_groups, self._traffic, self._stopwatch
        )
        self.__dict__.update(_parts=parts, _subnetwork=parts.subnetwork)
        return parts.optimizer

    def zero_optimization_partition_weights(self) -> bool:
        """``False``: what DeepSpeed does for its own ZeRO-3 parameters is not for ours."""
        return False

    def _backward_prologue(self) -> None:
        super()._backward_prologue()
        self._tell_boundary()

    def _tell_boundary(self) -> None:
        self.optimizer.synchronize_gradients = self.enable_backward_allreduce and not self.inside_no_sync_ctxt
        self.optimizer.set_gradient_accumulation_boundary(self.is_gradient_accumulation_boundary())

    def _backward_epilogue(self) -> None:
        if self._weights is not None:
            self._weights.complete_backward()
        super()._backward_epilogue()
        if self._weights is not None:
            self._weights.end_backward()
        self.optimizer.end_backward()

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        boundary = self.is_gradient_accumulation_boundary()
        self.optimizer.set_gradient_accumulation_boundary(boundary)
        if boundary or self.zero_optimization_partition_gradients():
            self.optimizer.reduce_gradients()

    def clip_fp32_gradients(self) -> None:
        """Nothing: the optimizer clips by the exact global norm, at stage 0 too."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def coalesce_grad_reduction(self) -> NoReturn:
        raise ConfigError("coalesce_grad_reduction: not available with SDP; use gradient_accumulation_steps")

    def offload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("offload_states: not available with SDP in this version")

    def reload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("reload_states: not available with SDP in this version")

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("save_16bit_model: would write one subnetwork; save_hf() writes the full model")


def _from_first(value: torch.Tensor, owners: Owners) -> None:
    for group in owners.levels:
        with group.waiting("the initial weights") as process_group:
            dist.broadcast(value, src=group.ranks[0], group=process_group)
