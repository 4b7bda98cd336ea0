"""A DeepSpeed engine that trains one subnetwork per worker."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine, NoopTimer

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.evaluation import evaluate_full
from deepspeed_sdp.engine.full_model import full_state_dict, save_hf
from deepspeed_sdp.engine.groups import OwnerGroups
from deepspeed_sdp.engine.memory import model_state_bytes
from deepspeed_sdp.engine.optimizer import OwnedParameters, SDPZeroOptimizer
from deepspeed_sdp.engine.param_groups import split_by_owner_set
from deepspeed_sdp.engine.stopwatch import Stopwatch
from deepspeed_sdp.engine.traffic import Traffic
from deepspeed_sdp.errors import ConfigError
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
        return full_state_dict(self._subnetwork, self.device, dtype)

    def evaluate_full(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
        """Collective. Mean loss per predicted token of the *full* model over the batches of all ranks, in nats.

        Ranks may bring different numbers of batches. Layers are gathered one at a time, so no rank needs more memory
        than its subnetwork, one full layer, and the hidden states of its batches.
        """
        return evaluate_full(self._subnetwork, batches, self.device)

    def save_hf(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Collective. Write the full model as a HuggingFace folder, which needs nothing of this package to load.

        Raises:
            OutputError: the folder cannot be written; on every rank.
        """
        save_hf(self._subnetwork, Path(folder), self.device, dtype)

    def sdp_stats(self) -> dict[str, Any]:
        """Figures of the last step on this rank.

        ``model_state_bytes`` (weights, gradients, optimizer; live tensors), ``bytes_sent`` and ``bytes_sent_by_kind``,
        ``seconds`` (forward, backward with its reductions, step; host time), ``grad_norm``, ``owned_numel``,
        ``subnetwork_index``, ``owner_sets`` (those this rank belongs to).
        """
        sets = {self._subnetwork.owner_set(name) for name in self._subnetwork.fragments}
        norm = self.get_global_grad_norm()
        return {
            "subnetwork_index": self.subnetwork_index,
            "owned_numel": self._subnetwork.owned_numel,
            "owner_sets": sorted(sets),
            "model_state_bytes": model_state_bytes(self),
            "bytes_sent": self._traffic.last_step_bytes,
            "bytes_sent_by_kind": dict(self._traffic.last_step),
            "seconds": dict(self._stopwatch.last_step),
            "grad_norm": None if norm is None else float(norm),
        }

    # -- time -------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        with self._stopwatch.phase("forward"):
            return super().forward(*inputs, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        with self._stopwatch.phase("backward"):
            return super().backward(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        steps = self.global_steps
        with self._stopwatch.phase("step"):
            super().step(*args, **kwargs)
        if self.global_steps > steps:
            self._stopwatch.end_step()

    def destroy(self) -> None:
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

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        groups = split_by_owner_set(_as_groups(model_parameters), self._subnetwork)
        return super()._configure_basic_optimizer([group for group, _ in groups])  # type: ignore[no-any-return]

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> SDPZeroOptimizer:
        stage = self.zero_optimization_stage()
        check_overflow = self.bfloat16_enabled() and self._config.bfloat16_config.check_grad_overflow
        return SDPZeroOptimizer(
            optimizer,
            self.param_names,
            owned=_owned_parameters(self._subnetwork),
            groups=self._owner_groups,
            traffic=self._traffic,
            partition_states=stage > 0,
            timers=self.timers if self.wall_clock_breakdown() else NoopTimer(),
            optimizer_params=self.optimizer_params(),
            static_loss_scale=self.loss_scale(),
            dynamic_loss_scale=self.dynamic_loss_scale(),
            dynamic_loss_args=self.dynamic_loss_scale_args(),
            clip_grad=self.gradient_clipping(),
            reduce_bucket_size=self.zero_reduce_bucket_size(),
            allgather_bucket_size=self.zero_allgather_bucket_size(),
            dp_process_group=self.seq_data_parallel_group,
            gradient_accumulation_steps=self.gradient_accumulation_steps(),
            partition_grads=stage > 1,
            parameter_alignment=self.zero_parameter_alignment(),
            gradient_accumulation_dtype=self.get_data_types()[1],
            communication_data_type=self.communication_data_type,
            check_grad_overflow=check_overflow,
        )

    def _backward_prologue(self) -> None:
        super()._backward_prologue()
        self.optimizer.synchronize_gradients = self.enable_backward_allreduce and not self.inside_no_sync_ctxt
        self.optimizer.set_gradient_accumulation_boundary(self.is_gradient_accumulation_boundary())

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

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("save_checkpoint: not available with SDP in this version; save_hf() writes the full model")

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("load_checkpoint: not available with SDP in this version; initialize() takes a full model")

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("save_16bit_model: would write one subnetwork; save_hf() writes the full model")


def _as_groups(model_parameters: Any) -> list[dict[str, Any]]:
    parameters = list(model_parameters)
    if parameters and isinstance(parameters[0], dict):
        return parameters
    return [{"params": parameters}]


def _in_total_order(subnetwork: Subnetwork) -> list[tuple[str, torch.nn.Parameter]]:
    position = subnetwork.positions()
    return sorted(
        subnetwork.module.named_parameters(), key=lambda item: (position[item[0]], subnetwork.owner_set(item[0]))
    )


def _owned_parameters(subnetwork: Subnetwork) -> OwnedParameters:
    positions = subnetwork.positions()
    named = dict(subnetwork.module.named_parameters())
    return OwnedParameters(
        owner_set={id(p): subnetwork.owner_set(name) for name, p in named.items()},
        position={id(p): positions[name] for name, p in named.items()},
    )
