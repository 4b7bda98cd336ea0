"""A DeepSpeed engine that trains one subnetwork per worker."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.utils import logger

from deepspeed_sdp.checkpoint import BackgroundWriter
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.assemble import assemble
from deepspeed_sdp.engine.checkpointing import load_checkpoint, save_checkpoint
from deepspeed_sdp.engine.consistency import check_owners
from deepspeed_sdp.engine.evaluation import evaluate_full
from deepspeed_sdp.engine.full_model import full_state_dict, save_hf
from deepspeed_sdp.engine.groups import OwnerGroups
from deepspeed_sdp.engine.memory import model_state_bytes
from deepspeed_sdp.engine.optimizer import SDPOptimizer
from deepspeed_sdp.engine.param_groups import as_groups, translate_groups
from deepspeed_sdp.engine.stopwatch import Stopwatch
from deepspeed_sdp.engine.traffic import Traffic
from deepspeed_sdp.errors import ConfigError, OutputError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import Subnetwork


class SDPEngine(DeepSpeedEngine):  # type: ignore[misc]
    """``DeepSpeedEngine`` with the plan, the full model's face, and gradients averaged over owners.

    Built by :func:`deepspeed_sdp.initialize`. Everything that ``DeepSpeedEngine`` offers keeps its meaning.
    """

    def __init__(
        self,
        *args: Any,
        sdp_config: SDPConfig,
        subnetwork: Subnetwork,
        groups: OwnerGroups,
        agreed_weights: bool,
        **kwargs: Any,
    ) -> None:
        # nn.Module.__init__ has not run yet, and DeepSpeed's __getattr__ needs it: straight into __dict__.
        self.__dict__.update(
            sdp_config=sdp_config,
            _subnetwork=subnetwork,
            _owner_groups=groups,
            _agreed_weights=agreed_weights,
            _traffic=Traffic(),
            _stopwatch=Stopwatch(),
            _weights=None,
            _checkpoint_writer=BackgroundWriter(),
        )
        super().__init__(*args, **kwargs)

    @property
    def plan(self) -> SubnetworkPlan:
        """Who owns what."""
        return self._subnetwork.plan  # type: ignore[no-any-return]

    @property
    def subnetwork_index(self) -> int:
        """``w``: the subnetwork that this rank trains."""
        return self._subnetwork.index  # type: ignore[no-any-return]

    # -- the full model ----------------------------------------------------------------------------------------------

    def full_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor] | None:
        """Collective. On rank 0 the full model's weights on the CPU under their HuggingFace names, elsewhere ``None``.

        Args:
            dtype: cast floating-point weights; ``None`` keeps the dtype they are trained in.
        """
        return full_state_dict(self._subnetwork, self.device, self.gathered_weights, dtype)

    def evaluate_full(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
        """Collective. Mean loss per predicted token of the *full* model over the batches of all ranks, in nats.

        Ranks may bring different numbers of batches. Layers are gathered one at a time, so no rank needs more memory
        than its subnetwork, one full layer, and the hidden states of its batches. Under backward masking every rank has
        the full model, and nothing is gathered.
        """
        self.optimizer.refresh.settle()
        with nullcontext() if self._weights is None else self._weights.paused():
            return evaluate_full(self._subnetwork, batches, self.device, self.gathered_weights)

    def save_hf(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Collective. Write the full model as a HuggingFace folder, which needs nothing of this package to load.

        Raises:
            OutputError: the folder cannot be written; on every rank.
        """
        save_hf(self._subnetwork, Path(folder), self.device, self.gathered_weights, dtype)

    @contextmanager
    def gathered_weights(self, layer: int | None = None) -> Iterator[None]:
        """Collective, between steps. Inside, this rank's weights of one decoder layer can be read, at any ZeRO stage.

        Under backward masking weights may still be under way after a step; here and in a forward pass they are not.

        Args:
            layer: number of the layer; ``None`` for everything outside of the layers.
        """
        self.optimizer.refresh.settle()
        if self._weights is None:
            yield
            return
        parts = self._weights.outer if layer is None else (layer + 1,)
        with self._weights.gathered(parts):
            yield

    def sdp_stats(self) -> dict[str, Any]:
        """Figures of the last step on this rank.

        ``model_state_bytes`` (weights, gradients, optimizer; live tensors), ``bytes_sent``, also by kind of collective
        and by owner set, ``seconds`` (host time: forward, backward with its reductions, step; ``communication`` from
        issue to completion of all collectives, ``exposed`` the part the host waited for, ``overlapped`` the rest; on
        an accelerator, whose queue runs behind the host, they are times of the host and no more),
        ``checkpoint_stall_seconds`` (what the last ``save_checkpoint`` took of the training), ``grad_norm``,
        ``owned_numel``, ``subnetwork_index``, ``owner_sets`` (those this rank belongs to).
        """
        owned = self._subnetwork.fragments.keys() - self._subnetwork.frozen
        sets = {self._subnetwork.owner_set(name) for name in owned}
        norm = self.get_global_grad_norm()
        return {
            "subnetwork_index": self.subnetwork_index,
            "owned_numel": self._subnetwork.owned_numel,
            "owner_sets": sorted(sets),
            "model_state_bytes": model_state_bytes(self),
            "bytes_sent": self._traffic.last_step_bytes,
            "bytes_sent_by_kind": dict(self._traffic.last_step),
            "bytes_sent_by_owner_set": self._traffic.last_step_by_owner_set,
            "seconds": self._stopwatch.last_step_seconds,
            "checkpoint_stall_seconds": self._stopwatch.checkpoint_stall,
            "grad_norm": None if norm is None else float(norm),
        }

    # -- time -------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        with self._stopwatch.phase("forward"):
            return super().forward(*inputs, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        # Also where the forward pass went around this engine's.
        self._tell_boundary()
        try:
            with self._stopwatch.phase("backward"):
                return super().backward(*args, **kwargs)
        except BaseException as error:
            self.optimizer.fail(error)
            raise

    def step(self, *args: Any, **kwargs: Any) -> None:
        steps = self.global_steps
        with self._stopwatch.phase("step"):
            if self.is_gradient_accumulation_boundary() or not self.managed_gradient_accumulation():
                self._check_owners(steps + 1)
            super().step(*args, **kwargs)
        if self.global_steps > steps:
            self._stopwatch.end_step()
            self._write_figures()

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
        interval = self.sdp_config.consistency_check_interval
        # At stage 3 there is one copy of every weight.
        if interval and step % interval == 0 and self.zero_optimization_stage() < 3:
            self.optimizer.refresh.settle()
            check_owners(self._subnetwork, step)

    def wait_for_checkpoint(self) -> bool:
        """Collective, with ``checkpoint_async``. Wait for the checkpoint under way.

        Returns:
            ``False`` if it could not be written and ``checkpoint_on_error`` is ``"continue"``.

        Raises:
            OutputError: it could not be written; on every rank.
        """
        return self._try_to_save(self._checkpoint_writer.wait)

    def _try_to_save(self, save: Callable[[], None]) -> bool:
        try:
            save()
        except OutputError as error:
            if self.sdp_config.checkpoint_on_error == "stop":
                raise
            if self.global_rank == 0:
                logger.error(f"no checkpoint was saved, the job goes on: {error}")
            return False
        return True

    def destroy(self) -> None:
        try:
            self.wait_for_checkpoint()
        finally:
            super().destroy()
            self._owner_groups.destroy()

    # -- what DeepSpeed's engine asks for ----------------------------------------------------------------------------

    def _broadcast_model(self) -> None:
        """Make owners agree: every parameter from the first rank that owns it, buffers from rank 0.

        Skipped where they agree by construction (built on the meta device from per-unit seeds).
        """
        if self._agreed_weights:
            return
        for name, parameter in _in_total_order(self._subnetwork):
            if self._subnetwork.masking == "backward":
                if name not in self._subnetwork.views:
                    dist.broadcast(parameter.data, src=0)
                continue
            ranks = self._owner_groups.ranks(self._subnetwork.owner_set(name))
            if len(ranks) > 1:
                group = self._owner_groups.group(self._subnetwork.owner_set(name))
                dist.broadcast(parameter.data, src=ranks[0], group=group)
        for _, buffer in self._subnetwork.module.named_buffers():
            dist.broadcast(buffer, src=0)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        if self.zero_optimization():
            super()._do_optimizer_sanity_check(basic_optimizer)
        # One optimizer wrapper for stages 0, 1 and 2 and for fp32 and bf16.
        return ZERO_OPTIMIZATION  # type: ignore[no-any-return]

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        if isinstance(client_optimizer, torch.optim.Optimizer):
            self._remember_groups(client_optimizer)
        elif client_optimizer is not None:
            build = client_optimizer
            client_optimizer = lambda parameters: self._remember_groups(build(parameters))  # noqa: E731
        super()._configure_optimizer(client_optimizer, model_parameters)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        groups = translate_groups(as_groups(model_parameters), self._subnetwork)
        return self._remember_groups(super()._configure_basic_optimizer(groups))

    def _remember_groups(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        # DeepSpeed drops groups of which this rank owns nothing; a scheduler counts them.
        self._client_groups = list(optimizer.param_groups)
        return optimizer

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> SDPOptimizer:
        optimizer.param_groups[:] = self._client_groups
        made, self.__dict__["_weights"] = assemble(
            self, optimizer, self._subnetwork, self._owner_groups, self._traffic, self._stopwatch
        )
        return made

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

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Collective. Write a checkpoint that any layout of the same model can load; see docs/checkpoints.md.

        With ``checkpoint_async`` this rank's part is copied to the CPU and written beside the training; an error comes
        with the next call, :meth:`wait_for_checkpoint`, :meth:`load_checkpoint` or :meth:`destroy`.

        Returns:
            ``False`` if it cannot be written and ``checkpoint_on_error`` is ``"continue"``.

        Raises:
            OutputError: it cannot be written; on every rank. What was there before is untouched.
            CheckpointError: ``client_state`` holds what could not be loaded safely.
        """
        if exclude_frozen_parameters:
            raise ConfigError("exclude_frozen_parameters: got True; takes False, a checkpoint is complete")
        return self._try_to_save(lambda: save_checkpoint(self, Path(save_dir), tag, client_state, save_latest))

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Collective. Take up a checkpoint of this model, whatever layout wrote it.

        Returns:
            its path and the client state; ``(None, None)`` where there is none and no ``tag`` was asked for.

        Raises:
            CheckpointError: it is missing, damaged or of another model; on every rank.
        """
        if custom_load_fn is not None or not load_module_strict:
            raise ConfigError("load_checkpoint: takes load_module_strict=True and no custom_load_fn")
        with_all = not load_module_only
        return load_checkpoint(
            self,
            Path(load_dir),
            tag,
            with_optimizer=with_all and load_optimizer_states,
            with_scheduler=with_all and load_lr_scheduler_states,
        )

    def offload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("offload_states: not available with SDP in this version")

    def reload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("reload_states: not available with SDP in this version")

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("save_16bit_model: would write one subnetwork; save_hf() writes the full model")


def _in_total_order(subnetwork: Subnetwork) -> list[tuple[str, torch.nn.Parameter]]:
    position = subnetwork.positions()
    return sorted(
        subnetwork.module.named_parameters(), key=lambda item: (position[item[0]], subnetwork.owner_set(item[0]))
    )
