"""Puts the parts of the gradient path together as a job's configuration asks."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from torch import nn

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.agreement import agreed
from deepspeed_sdp.engine.comm.description import describe_optimizer
from deepspeed_sdp.engine.comm.exchange import Exchange
from deepspeed_sdp.engine.comm.mesh import OwnerGroups, Owners
from deepspeed_sdp.engine.comm.stages import Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import AllToAllTransport, OwnerSetTransport, Transport, resolve_transport
from deepspeed_sdp.engine.deepspeed.param_groups import agree_on_groups
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, behaviour_of
from deepspeed_sdp.engine.zero.frozen import FrozenParameters
from deepspeed_sdp.engine.zero.layout import Layout, make_layout, make_parts
from deepspeed_sdp.engine.zero.nonfinite import NonFiniteGradients
from deepspeed_sdp.engine.zero.optimizer import Precision, SDPOptimizer
from deepspeed_sdp.engine.zero.refresh import WeightRefresh
from deepspeed_sdp.engine.zero.weights import ShardedWeights
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.subnetwork import Subnetwork

# Elements of the full model in a round of gradients, unless the job says. DeepSpeed's default is larger than most
# models: nothing would overlap. On a CPU smaller pieces also stay in reach of the allocator; measured by
# benchmarks/engine_speed.py.
_ROUND_NUMEL = {"gloo": 5_000_000}
_DEFAULT_ROUND_NUMEL = 25_000_000

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assemble(
    engine: Any,
    optimizer: torch.optim.Optimizer,
    subnetwork: Subnetwork,
    groups: OwnerGroups,
    traffic: Traffic,
    stopwatch: Stopwatch,
) -> tuple[SDPOptimizer, ShardedWeights | None]:
    """The ZeRO optimizer around a client's ``optimizer``; at stage 3 also what gathers and frees the weights.

    Args:
        engine: a ``DeepSpeedEngine`` in the middle of its construction: its configuration and device are there.
        optimizer: its groups carry ``GROUP_KEY`` and hold parameters of the subnetwork.

    Raises:
        ConfigError: the optimizer is none that can step shards, or trained parameters differ in dtype; on every rank.
    """
    sdp: SDPConfig = engine.sdp_config
    zero, stage = engine._config.zero_config, engine.zero_optimization_stage()
    backend = groups.world.backend
    dtype, accumulate = engine.get_data_types()
    reduce = _DTYPES[sdp.reduction_dtype] if sdp.reduction_dtype else engine.communication_data_type

    stages = Stages(engine.device, groups.replicas)

    def transport(payload: Any, everyone: Owners, of: torch.dtype) -> Transport:
        if resolve_transport(sdp.transport, backend, stage, payload) == "all_to_all":
            return AllToAllTransport(everyone, engine.device, of, stages, traffic, stopwatch)
        return OwnerSetTransport(stages, traffic, stopwatch)

    state_device = _offload_device(zero.offload_optimizer, engine.device)
    # What DeepSpeed or a client's callable made is compared here for the first time.
    behaviour = agreed(lambda: behaviour_of(optimizer, state_device), lambda _: describe_optimizer(optimizer))
    if subnetwork.masking == "backward":
        agree_on_groups(subnetwork)
    group_of = {id(p): group[GROUP_KEY] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in subnetwork.module.named_parameters() if id(p) in group_of}
    agreed(lambda: _check_dtypes(subnetwork, trained, dtype))
    layout = make_layout(subnetwork, groups, group_of, stage=stage, round_numel=reduce_bucket_numel(engine))
    for_weights = transport("weights", groups.for_weights, dtype)
    weights = None
    if stage == 3:
        weights = ShardedWeights(
            subnetwork.module,
            make_parts(subnetwork, layout),
            for_weights,
            prefetch=1 if zero.prefetch_bucket_size else 0,
            device=_offload_device(zero.offload_param, engine.device),
        )
    fragments = subnetwork.fragments
    exchange = None
    if subnetwork.masking == "backward":
        exchange = Exchange(groups.for_weights, stage > 0, engine.device, dtype, stages, traffic, stopwatch)
    is_lazy = exchange is not None and sdp.overlap_refresh
    portion_numel = _asked_numel(engine._config, "allgather_bucket_size") or _default_numel()
    refresh = WeightRefresh(
        layout.portions(portion_numel, is_gathered=0 < stage < 3, is_exchanged=exchange is not None),
        for_weights,
        0 < stage < 3,
        exchange,
        # The averaged gradients are gone when weights travel: with no more than they took the peak does not grow.
        budget=accumulate.itemsize * sum(b.shard_numel for of_round in layout.rounds for b in of_round) * is_lazy,
        is_lazy=is_lazy,
    )
    if is_lazy:
        _settle_where_used(subnetwork, layout, refresh)
    parameters = dict(enumerate(layout.parameters))
    names = [fragments[name].full_name for name in layout.names]
    made = SDPOptimizer(
        optimizer,
        behaviour,
        layout.rounds,
        parameters,
        refresh,
        stage=stage,
        transport=transport("gradients", groups.for_gradients, reduce),
        world=groups.world,
        device=engine.device,
        precision=Precision(reduce, accumulate),
        loss_scaler=CreateLossScaler(
            dtype=dtype,
            static_loss_scale=engine.loss_scale(),
            dynamic_scaling=engine.dynamic_loss_scale(),
            dynamic_loss_args=engine.dynamic_loss_scale_args(),
        ),
        clip_grad=engine.gradient_clipping(),
        state_device=state_device,
        nonfinite=NonFiniteGradients(names, sdp.on_nonfinite),
        frozen=FrozenParameters(
            [bucket for of_round in layout.rounds for bucket in of_round],
            parameters,
            names,
            {
                fragments[name].full_name: p
                for name, p in subnetwork.module.named_parameters()
                if not p.requires_grad and name not in subnetwork.frozen
            },
            [subnetwork.module.get_parameter(name) for name in subnetwork.frozen],
        ),
        untrained=[p for p in engine.module.parameters() if p.requires_grad and id(p) not in group_of],
        traffic=traffic,
    )
    if weights is not None:
        weights.before_backward = made.launch_before
    return made, weights


def _check_dtypes(subnetwork: Subnetwork, trained: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Weights travel together, in one dtype: that of the DeepSpeed config, to which DeepSpeed casts 16-bit training."""
    for name, parameter in trained.items():
        if parameter.dtype != dtype:
            raise ConfigError(
                f"model: {subnetwork.fragments[name].full_name} is {_word(parameter.dtype)} in a job of {_word(dtype)}"
                '; takes trained parameters of one dtype, that of the DeepSpeed config ("bf16", "fp16", or neither for '
                "fp32): cast the model, drop keep_in_fp32_modules, or freeze the parameter"
            )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settle_where_used(subnetwork: Subnetwork, layout: Layout, refresh: WeightRefresh) -> None:
    """Weights may still be under way when the next forward pass begins: each module waits for its own."""
    for part in make_parts(subnetwork, layout):
        needed = [i for i, portion in enumerate(refresh.portions) if set(portion.rounds) & set(range(*part.rounds))]
        for module in part.modules if needed else ():
            refresh.settle_before(module, max(needed))
    refresh.settle_before_state_dict(subnetwork.module)


def reduce_bucket_numel(engine: Any) -> int:
    """Elements of the full model in a bucket of gradients, of an engine of this package."""
    return _asked_numel(engine._config, "reduce_bucket_size") or _default_numel()


def _default_numel() -> int:
    return _ROUND_NUMEL.get(dist.get_backend(), _DEFAULT_ROUND_NUMEL)


def _asked_numel(config: Any, key: str) -> int | None:
    """What the job itself says of ``zero_optimization.<key>``, if anything."""
    zero = config._param_dict.get("zero_optimization", {})
    asked = zero.get(key, "auto") if isinstance(zero, dict) else "auto"
    return None if asked == "auto" else int(asked)


def _offload_device(offload: Any, device: torch.device) -> torch.device:
    is_cpu = offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"
    return torch.device("cpu") if is_cpu else device
