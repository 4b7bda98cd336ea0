"""Puts the parts of the gradient path together as a job's settings ask."""

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.engine.comm.description import describe_optimizer, digest
from deepspeed_sdp.engine.comm.exchange import Exchange
from deepspeed_sdp.engine.comm.mesh import OwnerGroups, Owners
from deepspeed_sdp.engine.comm.stages import Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.comm.transport import AllToAllTransport, OwnerSetTransport, Transport, resolve_transport
from deepspeed_sdp.engine.deepspeed.param_groups import agree_on_groups
from deepspeed_sdp.engine.deepspeed.settings import Settings
from deepspeed_sdp.engine.deepspeed.tools import ParameterTools
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, behaviour_of
from deepspeed_sdp.engine.zero.frozen import FrozenParameters
from deepspeed_sdp.engine.zero.gradients import GradientPath
from deepspeed_sdp.engine.zero.host_copies import HostCopies
from deepspeed_sdp.engine.zero.layout import Layout, make_layout, make_parts
from deepspeed_sdp.engine.zero.nonfinite import NonFiniteGradients
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.outer_step import OuterStep
from deepspeed_sdp.engine.zero.refresh import RefreshRules, WeightRefresh
from deepspeed_sdp.engine.zero.rounds import last_portion
from deepspeed_sdp.engine.zero.weights import ShardedWeights
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.subnetwork import Subnetwork


@dataclass(frozen=True)
class Parts:
    """What an engine trains with.

    Attributes:
        subnetwork: with the client's groups.
        groups: of processes.
        layout: of the subnetwork in buckets.
        optimizer: what DeepSpeed's engine takes for its ZeRO optimizer.
        weights: at stage 3, what gathers and frees them.
        tools: what DeepSpeed's own tools come to by a parameter.
        outer: where workers train apart, how owners agree.
    """

    subnetwork: Subnetwork
    groups: OwnerGroups
    layout: Layout
    optimizer: SDPOptimizer
    weights: ShardedWeights | None
    tools: ParameterTools
    outer: OuterStep | None

    def close(self) -> None:
        """Take all hooks off the model and let go of parameters and of weights (at stage 3)."""
        with ExitStack() as stack:
            if self.weights is not None:
                stack.callback(self.weights.close)
            stack.callback(self.tools.close)
            self.optimizer.destroy()


def assemble(
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    subnetwork: Subnetwork,
    group_of: Mapping[str, int],
    groups: OwnerGroups,
    traffic: Traffic,
    stopwatch: Stopwatch,
    renewed: SDPOptimizer | None = None,
) -> Parts:
    """The ZeRO optimizer around a client's ``optimizer``, and what it works with.

    Args:
        optimizer: its groups carry ``GROUP_KEY`` and hold parameters of the subnetwork.
        group_of: the client's parameter group of every full parameter that this rank knows to be in one, by name.
        renewed: the ZeRO optimizer that there is around it, which becomes the new one.

    Raises:
        ConfigError: the optimizer is none that can step shards, or trained parameters differ in dtype; on every rank.
    """
    sdp, stage, device, dtype = settings.sdp, settings.stage, settings.device, settings.dtype
    backend, stages, is_apart = groups.world.backend, Stages(device, groups.replicas), sdp.schedule.is_apart

    def transport(payload: Literal["gradients", "weights"], everyone: Owners, of: torch.dtype) -> Transport:
        if not is_apart and resolve_transport(sdp.comm.transport, backend, stage, payload) == "all_to_all":
            return AllToAllTransport(everyone, device, of, stages, traffic, stopwatch)
        return OwnerSetTransport(stages, traffic, stopwatch)

    # What DeepSpeed or a client's callable made is compared here for the first time.
    if renewed is None:
        behaviour = agreed(
            lambda: behaviour_of(optimizer, settings.state.device), lambda _: describe_optimizer(optimizer)
        )
    else:
        behaviour = renewed.behaviour
    is_masked = subnetwork.masking == "backward"
    agreed_groups = agree_on_groups(group_of, subnetwork.full_order) if is_masked else dict(group_of)
    subnetwork = replace(subnetwork, group_of=agreed_groups)
    group_of_id = {id(p): group[GROUP_KEY] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in subnetwork.module.named_parameters() if id(p) in group_of_id}
    agreed(lambda: _check_dtypes(subnetwork, trained, dtype))
    layout = make_layout(
        subnetwork, groups, group_of_id, stage=stage, round_numel=settings.round_numel, is_apart=is_apart
    )
    for_weights = transport("weights", groups.for_weights, dtype)
    weights = None
    if stage == 3:
        weights = ShardedWeights(
            subnetwork.module,
            make_parts(subnetwork, layout),
            for_weights,
            prefetch=settings.prefetch,
            device=settings.weights.device,
            is_pinned=settings.weights.is_pinned,
        )
    exchange = None
    if is_masked:
        exchange = Exchange(groups.for_weights, stage > 0, device, dtype, stages, traffic, stopwatch)
    everywhere = refresh = _refresh(settings, subnetwork, layout, for_weights, exchange)
    if is_apart and exchange is not None:
        # Copies are brought up to date when owners have agreed.
        refresh = _refresh(settings, subnetwork, layout, for_weights, None)
    parameters = dict(enumerate(layout.parameters))
    fragments = subnetwork.fragments
    names = [fragments[name].full_name for name in layout.names]
    gradients = GradientPath(
        layout.rounds,
        parameters,
        transport("gradients", groups.for_gradients, settings.reduce),
        reduce=settings.reduce,
        accumulate=settings.accumulate,
        is_eager=stage < 3,
        untrained=[p for p in subnetwork.module.parameters() if p.requires_grad and id(p) not in group_of_id],
    )
    host_copies = functools.partial(
        HostCopies, dtype=dtype, is_pinned=settings.state.is_pinned, sends=not settings.weights.is_offloaded
    )
    made = (SDPOptimizer if renewed is None else renewed.renew)(
        optimizer,
        behaviour,
        gradients,
        refresh,
        everywhere,
        stage=stage,
        world=groups.world,
        norm_levels=groups.for_gradients.inner if is_apart else (groups.world,),
        device=device,
        loss_scaler=settings.loss_scaler,
        clip_grad=settings.clip_grad,
        state_device=settings.state.device,
        host_copies=host_copies if settings.state.is_offloaded else None,
        nonfinite=NonFiniteGradients(names, sdp.comm.on_nonfinite, is_apart),
        frozen=FrozenParameters(
            gradients.buckets,
            parameters,
            names,
            {
                fragments[name].full_name: p
                for name, p in subnetwork.module.named_parameters()
                if not p.requires_grad and name not in subnetwork.frozen
            },
            [subnetwork.module.get_parameter(name) for name in subnetwork.frozen],
            is_apart,
        ),
        identity=digest([subnetwork.fragments[name] for name in layout.names]),
        traffic=traffic,
        is_apart=is_apart,
    )
    outer = None
    if is_apart:
        schedule = sdp.schedule
        outer = OuterStep(made, schedule.outer_optimizer, schedule.moments_sync, stages, traffic, stopwatch)
        outer.begin()
    if weights is not None:
        weights.before_backward = made.launch_before
    return Parts(subnetwork, groups, layout, made, weights, ParameterTools(subnetwork, made), outer)


def _refresh(
    settings: Settings, subnetwork: Subnetwork, layout: Layout, transport: Transport, exchange: Exchange | None
) -> WeightRefresh:
    numel = sum(bucket.shard_numel for bucket in layout.buckets)
    rules = RefreshRules.of(settings.stage, exchange is not None, settings.sdp, settings.accumulate, numel)
    portions = layout.portions(settings.portion_numel, is_gathered=rules.is_gathered, is_exchanged=rules.is_exchanged)
    refresh = WeightRefresh(portions, rules, transport, exchange)
    if rules.is_lazy:
        _settle_where_used(subnetwork, layout, refresh)
    return refresh


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
        needed = last_portion(refresh.portions, part.rounds)
        if needed is not None:
            for module in part.modules:
                refresh.settle_before(module, needed)
    refresh.settle_before_state_dict(subnetwork.module)
