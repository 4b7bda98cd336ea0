"""``engine.repartition``: a checkpoint through memory. The subnetworks of a running job become those of another plan.

What the optimizer keeps moves (:mod:`deepspeed_sdp.engine.state.moving`) while there are neither old nor new weights,
which are made of it afterwards: so no more is needed at once than what the larger plan trains with, and a portion.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from deepspeed_sdp.agreement import agree, agreed, from_first_rank
from deepspeed_sdp.checkpoint import Run, cut, factor_on
from deepspeed_sdp.config import BLOCK, SDPConfig
from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.deepspeed.memory import model_state_bytes
from deepspeed_sdp.engine.deepspeed.param_groups import agree_on_groups
from deepspeed_sdp.engine.deepspeed.refusals import check_apart, check_stage
from deepspeed_sdp.engine.deepspeed.settings import Settings
from deepspeed_sdp.engine.state.moving import Wanted, Whereabouts, move
from deepspeed_sdp.engine.state.training_state import TrainingState, run_of, shard_of, untrained_of
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY
from deepspeed_sdp.engine.zero.build import assemble
from deepspeed_sdp.engine.zero.layout import Layout, make_layout
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.errors import ConfigError, StateError
from deepspeed_sdp.plan import SubnetworkPlan, place_workers
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.subnetwork import Subnetwork, give_memory, graft, plan_for, recut

Moments = Literal["move", "reset"]

# Keys by which engines of the same plan differ.
_OF_ENGINES = ("masking", "output_scaling", "backward", "comm", "schedule")

# Meshes whose process groups are kept: this one's, and the last one's, to which a job may come back.
_MESHES = 2


def changed(sdp: SDPConfig, changes: Mapping[str, Any]) -> SDPConfig:
    """The block with some of its keys.

    Raises:
        ConfigError: see :meth:`SDPConfig.parse`.
    """
    if "coverage" in changes and sdp.schedule.coverage_schedule:
        raise ConfigError(f"{BLOCK}.coverage: got {changes['coverage']!r}; schedule.coverage_schedule says it here")
    written = sdp.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for key, value in changes.items():
        within = written.get(key)
        is_nested = isinstance(within, dict) and isinstance(value, Mapping) and key != "coverage"
        written[key] = {**within, **value} if is_nested and isinstance(within, dict) else value
    made = SDPConfig.parse(written)
    if not made.enabled:
        raise ConfigError(f"{BLOCK}.enabled: got false; takes true in an engine that trains subnetworks")
    return made


def repartition(engine: Any, plan: SubnetworkPlan | None, sdp: SDPConfig, moments: Moments) -> None:
    """Collective; see :meth:`SDPEngine.repartition`."""
    old, optimizer, groups = engine._subnetwork, engine.optimizer, engine._owner_groups
    agreed(lambda: _check(engine, sdp, moments))
    agree(lambda: {BLOCK: sdp.written(), "plan": None if plan is None else plan.hash, "moments": moments})
    plan, workers = from_first_rank(lambda: placed(plan, old, sdp, groups))
    agreed(lambda: check_apart(engine.zero_optimization_stage(), sdp, len(workers) // plan.num_subnetworks))
    is_same = (plan.hash, workers) == (old.plan.hash, groups.workers) and moments == "move"
    if is_same and all(getattr(sdp, key) == getattr(engine.sdp_config, key) for key in _OF_ENGINES):
        engine.__dict__["sdp_config"] = sdp
        return
    engine.wait_for_checkpoint()
    optimizer.refresh.settle()
    optimizer.zero_grad()
    # A round ends early: what moves is what owners agree on.
    engine.synchronize_workers()
    group_of = agree_on_groups(old.group_of, old.full_order)
    frozen = set().union(*gather_objects(_frozen_by_client(old), "what clients have frozen"))
    # From here on nothing is refused but by all ranks, and nothing is changed until all agree.
    new_groups = _mesh(engine, plan, workers)
    made = agreed(lambda: recut_as(old, plan, new_groups.subnetwork_index, sdp, group_of))
    settings = Settings.of(engine, sdp)
    layout = _layout(made, new_groups, settings)
    agreed(lambda: check_memory(engine, made, settings))

    state = TrainingState(old, optimizer, groups)
    scalars, mine = state.scalars(), state.layout()
    is_first = groups.inner(groups.rank)[0] == groups.rank
    layouts = gather_objects(mine if is_first else None, "what ranks hold before a re-partition")
    whereabouts = Whereabouts(
        {worker: of for worker, of in zip(groups.workers, layouts, strict=True) if of is not None},
        groups.workers,
        settings.stage > 0,
        groups.replicas if optimizer.is_apart else 0,
    )
    dtypes = {run.name: _dtype_of(whereabouts, run) for runs in whereabouts.runs.values() for run in runs}
    held = _take_out(state, mine, settings.stage)
    basic, kept = optimizer.optimizer, {} if moments == "reset" else optimizer.behaviour.state
    buckets = [_wanted_of(bucket, made, layout, kept, settings, state.has_state) for bucket in layout.buckets]
    others = {
        name: Wanted((run,), {"model": dtypes[run.name]}, settings.device, run.numel, {})
        for name, run, _, _ in untrained_of(made, new_groups)
    }
    engine._parts.close()
    del state
    basic.state.clear()
    for group in basic.param_groups:
        group["params"] = []
    optimizer.forget()
    _free(old.module)
    move(
        whereabouts, held, [*buckets, *others.values()], _portions(old, made, settings.portion_numel), groups.world,
        settings.device, lambda nbytes: engine._traffic.add("repartition", nbytes),
    )  # fmt: skip

    made = graft(old.module, made)
    give_memory(made.module, lambda name, _: _memory_of(name, made, others, settings))
    for name, buffer in made.persistent_buffers():
        if name in others:
            buffer.data.copy_(others[name].tensor("model").view(buffer.shape))
    _give_groups(basic, made)
    parts = assemble(settings, basic, made, group_of, new_groups, engine._traffic, engine._stopwatch, renewed=optimizer)
    engine.__dict__.update(
        _parts=parts, _subnetwork=parts.subnetwork, _owner_groups=new_groups, sdp_config=sdp,
        param_names={p: name for name, p in made.module.named_parameters()},
    )  # fmt: skip
    for name, parameter in parts.subnetwork.module.named_parameters():
        if made.fragments[name].full_name in frozen:
            parameter.requires_grad_(False)
    _fold_scale(engine, old, buckets)
    _put_in(optimizer, buckets, scalars if moments == "move" else [{}] * len(scalars))
    optimizer.spread()
    if parts.outer is not None:
        parts.outer.begin()


def _check(engine: Any, sdp: SDPConfig, moments: Moments) -> None:
    check_stage(engine.zero_optimization_stage(), sdp)
    if sdp.schedule.is_apart and engine.fp16_enabled():
        raise ConfigError(f"{BLOCK}.schedule: got local steps in a job of fp16; takes bf16 or fp32")
    if moments not in ("move", "reset"):
        raise ConfigError(f'moments: got {moments!r}; takes "move" or "reset"')
    engine.optimizer.check_backward()
    if engine.micro_steps % engine.gradient_accumulation_steps() or engine.optimizer.gradients.averages:
        raise StateError("engine.repartition: got a call in the middle of a step; takes one after engine.step()")


def placed(
    plan: SubnetworkPlan | None, old: Subnetwork, sdp: SDPConfig, groups: OwnerGroups
) -> tuple[SubnetworkPlan, tuple[int, ...]]:
    """A plan, or the one that ``sdp`` asks for, and the subnetwork of every rank under it.

    Raises:
        ConfigError, PlanError: it does not fit the model or the ranks.
    """
    world = len(groups.workers)
    if plan is None:
        plan = plan_for(old.full.skeleton, sdp, world, dist.get_backend())
    plan.validate()
    if sdp.checkpoint.copies > (fewest := min(map(len, plan.owner_sets))):
        raise ConfigError(
            f"{BLOCK}.checkpoint.copies: got {sdp.checkpoint.copies} with {fewest} owners per unit; takes 1 to {fewest}"
        )
    return plan, place_workers(plan, world, groups.ranks_per_node or world, sdp.plan.rank_order)


def _mesh(engine: Any, plan: SubnetworkPlan, workers: Sequence[int]) -> OwnerGroups:
    """Collective. The process groups of a plan: those that there are, or new ones in the place of the oldest."""
    meshes: dict[Any, OwnerGroups] = engine._meshes
    now = engine._owner_groups
    identity = (plan.owner_sets, tuple(workers), now.ranks_per_node)
    found = meshes.pop(identity, None) or OwnerGroups(*identity)
    meshes[identity] = found
    for oldest in [key for key in meshes if meshes[key] not in (now, found)][: max(0, len(meshes) - _MESHES)]:
        meshes.pop(oldest).destroy()
    return found


def recut_as(
    old: Subnetwork, plan: SubnetworkPlan, index: int, sdp: SDPConfig, group_of: Mapping[str, int]
) -> Subnetwork:
    """The subnetwork of worker ``index``, as the block asks; see :func:`~deepspeed_sdp.subnetwork.recut.recut`."""
    return recut(
        old,
        plan,
        index,
        masking=sdp.masking,
        output_scaling=sdp.output_scaling,
        block_unit=sdp.block_unit,
        recompute_frozen=sdp.backward.recompute_frozen,
        group_of=group_of,
    )


def _frozen_by_client(subnetwork: Subnetwork) -> list[str]:
    """Full parameters that the client has frozen in mid-run."""
    named = {
        n: p for n, p in subnetwork.module.named_parameters() if n not in subnetwork.frozen and not p.requires_grad
    }
    full = {subnetwork.fragments[name].full_name for name in named}
    return sorted(name for name in full if subnetwork.is_trained(name))


def _trained(subnetwork: Subnetwork) -> dict[str, int]:
    """The client's group of every parameter that this rank trains, by its name in the subnetwork."""
    full = {name: fragment.full_name for name, fragment in subnetwork.fragments.items()}
    return {
        name: subnetwork.group_of[full[name]]
        for name, p in subnetwork.module.named_parameters()
        if p.requires_grad and p.numel() and full[name] in subnetwork.group_of
    }


def _layout(subnetwork: Subnetwork, groups: OwnerGroups, settings: Settings) -> Layout:
    """Of parameters on the meta device: no memory."""
    trained = {id(subnetwork.module.get_parameter(n)): group for n, group in _trained(subnetwork).items()}
    return make_layout(
        subnetwork,
        groups,
        trained,
        stage=settings.stage,
        round_numel=settings.round_numel,
        is_apart=settings.sdp.schedule.is_apart,
    )


def check_memory(engine: Any, made: Subnetwork, settings: Settings) -> None:
    """Whether this rank has room for what ``made`` holds more than there is now; its parameters may have no memory.

    Raises:
        ConfigError: it has not.
    """
    replicas = dist.get_world_size() // made.plan.num_subnetworks
    # Who shares a state: owners, or the replicas of one where workers train apart.
    is_apart = settings.sdp.schedule.is_apart
    owners = {
        name: replicas * (1 if is_apart else len(made.plan.owner_sets[made.owner_set(name)])) for name in made.fragments
    }
    numels = {name: p.numel() for name, p in made.module.named_parameters() if name not in made.views}
    trained = {name: made.module.get_parameter(name).numel() for name in _trained(made)}
    shards = sum(numel / (owners[name] if settings.stage else 1) for name, numel in trained.items())
    weights = shards if settings.stage == 3 else sum(numels.values())
    kinds = {kind for of in engine.optimizer.behaviour.state.values() for kind, kept in of.items() if kept.by_element}
    is_master = settings.dtype == torch.float32
    needed = weights * settings.dtype.itemsize + 4 * shards * (len(kinds) + (not is_master))
    more, available = needed - model_state_bytes(engine)["total"], get_accelerator().available_memory()
    if more > available:
        raise ConfigError(
            f"{BLOCK}.coverage: got {made.plan.coverage:g}, with which a rank holds {more / 1e9:.2f} GB more than now; "
            f"takes less, as there are {available / 1e9:.2f} GB left"
        )


def _take_out(state: TrainingState, layout: Any, stage: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """What this rank holds, without the weights that it may be a part of."""
    keys = [(number, place) for number, of in enumerate(layout.sections) for place in range(len(of.buckets))]
    held = {}
    for key, tensors in zip(keys, state.held(), strict=True):
        # At ZeRO 0 a bucket is whole: nothing else is in that memory.
        held[key] = {
            kind: value.clone() if stage and value.untyped_storage().nbytes() > value.nbytes else value.detach()
            for kind, value in tensors.items()
        }
    return held


def _dtype_of(whereabouts: Whereabouts, run: Run) -> torch.dtype:
    worker = whereabouts.runs[run.name][run]
    return whereabouts.kinds_of(worker, run).get("model", torch.float32)


def _wanted_of(
    bucket: OwnerBucket, made: Subnetwork, layout: Layout, kept: Mapping[int, Any], settings: Settings, has_state: bool
) -> Wanted:
    start, stop = shard_of(bucket, dist.get_rank())
    whole = (replace(run_of(made, layout.names[i]), start=low, stop=high) for i, low, high in bucket.ranges)
    kinds = {"master": torch.float32}
    for key, of in sorted(kept.get(bucket.client_group, {}).items()) if has_state else ():
        if of.by_element:
            kinds[f"optimizer.{key}"] = of.dtype
    return Wanted(tuple(cut(whole, start, stop)), kinds, settings.state.device, bucket.shard_numel, {})


def _portions(old: Subnetwork, made: Subnetwork, numel: int) -> list[list[str]]:
    """Names of the full model's parameters and buffers, in backward order, about ``numel`` elements at a time."""
    sizes = {name: p.numel() for name, p in old.full.skeleton.named_parameters()}
    portions: list[list[str]] = [[]]
    filled = 0
    for name in reversed(old.full_order):
        if filled and filled + sizes[name] > numel:
            portions.append([])
            filled = 0
        portions[-1].append(name)
        filled += sizes[name]
    buffers = {name for subnetwork in (old, made) for name, _ in subnetwork.persistent_buffers()}
    # The full model's, as ranks may hold different ones.
    buffers |= {name for name, _ in old.full.skeleton.named_buffers()}
    return [*portions, sorted(buffers)]


def _free(module: torch.nn.Module) -> None:
    for part in module.modules():
        part._parameters.clear()


def _memory_of(name: str, made: Subnetwork, others: Mapping[str, Wanted], settings: Settings) -> torch.Tensor:
    parameter, fragment = made.module.get_parameter(name), made.fragments[name]
    if name in made.views:
        return torch.empty(0, dtype=settings.dtype, device=settings.device)
    if not made.is_trained(fragment.full_name):
        return others[name].tensor("model").view(parameter.shape)
    return torch.zeros(parameter.shape, dtype=settings.dtype, device=settings.device)


def _give_groups(basic: torch.optim.Optimizer, made: Subnetwork) -> None:
    made.link_views()
    trained = _trained(made)
    for group in basic.param_groups:
        names = [name for name, of in trained.items() if of == group[GROUP_KEY]]
        group["params"] = [made.module.get_parameter(name) for name in names]


def _fold_scale(engine: Any, old: Subnetwork, buckets: Sequence[Wanted]) -> None:
    """The full model stays what it was: where the new layout has no scale beside the weights, it goes into them."""
    new: Subnetwork = engine._subnetwork
    if engine.full_scale == 1.0 or (new.is_louder and new.writes == old.writes):
        return
    for one in buckets:
        first = 0
        for run in one.runs:
            for kind, values in one.tensors.items() if run.name in old.writes else ():
                values[first : first + run.numel].mul_(factor_on(kind, engine.full_scale))
            first += run.numel
    engine.full_scale = 1.0


def _put_in(optimizer: SDPOptimizer, buckets: Sequence[Wanted], scalars: Sequence[Mapping[str, Any]]) -> None:
    for (bucket, master), one in zip(_masters(optimizer), buckets, strict=True):
        master.data.copy_(one.tensor("master"))
        moved = {kind.removeprefix("optimizer."): one.tensor(kind) for kind in one.kinds if kind != "master"}
        for key, kept in optimizer.behaviour.state[bucket.client_group].items():
            if not kept.by_element and key in scalars[bucket.client_group]:
                moved[key] = kept.number(scalars[bucket.client_group][key]["value"])
        one.tensors.clear()
        if moved:
            optimizer.optimizer.state[master].update(moved)


def _masters(optimizer: SDPOptimizer) -> Iterator[tuple[OwnerBucket, Any]]:
    yield from optimizer.masters.items()
