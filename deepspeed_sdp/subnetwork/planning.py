"""The plan of a model, from the SDP block."""

import fnmatch
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from deepspeed_sdp.adapters import Adapter, Block, Layer, PartitionedModule, find_adapter
from deepspeed_sdp.adapters.base import matmul_flops, weight_gradient_flops
from deepspeed_sdp.adapters.claims import check_claims
from deepspeed_sdp.config import BLOCK, MOST_UNASKED_SUBNETWORKS, SDPConfig, SDPSource
from deepspeed_sdp.errors import ConfigError, PlanError
from deepspeed_sdp.plan import SubnetworkPlan, UnitSpace, make_plan
from deepspeed_sdp.subnetwork.trial import try_adapter


def plan_for(model: nn.Module, sdp: SDPSource, world_size: int, backend: str = "nccl") -> SubnetworkPlan:
    """The plan of ``model`` (real or meta) under ``sdp`` on ``world_size`` ranks; a pure function.

    A world of one owns every unit: there coverage 1 is taken, whatever the block says. ``backend``: of the job's
    collectives, by which the default of ``plan.max_owner_sets`` goes.

    Raises:
        ConfigError, ModelError, PlanError: the block does not fit the world size, the model or each other.
    """
    sdp = SDPConfig.of(sdp)
    adapter = find_adapter(model)
    kinds = kinds_of(sdp, adapter)
    check_claims(model, adapter, kinds, sdp.block_unit)
    try_adapter(model, adapter, kinds, sdp.block_unit, sdp.masking)
    found = partitioned(model, sdp, adapter)
    spaces = [item.space for item in found]
    shared = shared_flops(model, sdp, spaces)
    if sdp.masking == "backward":
        # Whoever owns a unit, all compute with it; its owners compute the gradient of its weights besides.
        full = sum(space.num_units * space.unit_flops for space in spaces)
        spaces = [
            replace(item.space, unit_flops=weight_gradient_flops(item.space.unit_numel, item.positions))
            for item in found
        ]
        shared += full - sum(space.num_units * space.unit_flops for space in spaces)
    if sdp.plan.file is not None:
        return read_plan(sdp, spaces, world_size)
    num_subnetworks = sdp.subnetworks(world_size)
    if world_size == 1:
        sdp = sdp.of_one_rank()
    return make_plan(
        spaces,
        num_subnetworks,
        owners_per_unit=sdp.owners(num_subnetworks),
        design=sdp.plan.design,
        max_owner_sets=sdp.owner_sets_bound(num_subnetworks, backend),
        chunk_multiple=sdp.plan.chunk_multiple,
        seed=sdp.plan.seed,
        shared_flops=shared,
        worker_capacity=sdp.capacity(num_subnetworks),
    )


def read_plan(sdp: SDPConfig, spaces: Sequence[UnitSpace], world_size: int) -> SubnetworkPlan:
    """The plan of ``sdp.plan.file``.

    Raises:
        ConfigError: it was made for another model or number of workers.
        PlanError: the file cannot be read, or holds no valid plan.
    """
    key = "subnetwork_data_parallel.plan.file"
    try:
        plan = SubnetworkPlan.read(Path(str(sdp.plan.file)))
    except PlanError as error:
        raise PlanError(f"{key}: {error}") from None
    planned = [space.space for space in plan.spaces]
    if [_identity(space) for space in planned] != [_identity(space) for space in spaces]:
        mine, theirs = _first_difference(spaces, planned)
        raise ConfigError(
            f"{key}: {sdp.plan.file} is of another model or granularity: it has {theirs}, the model {mine}"
        )
    workers = sdp.num_subnetworks or plan.num_subnetworks
    if workers != plan.num_subnetworks or world_size % workers:
        raise ConfigError(
            f"{key}: {sdp.plan.file} is for {plan.num_subnetworks} workers; got num_subnetworks {workers} and a world "
            f"size of {world_size}; takes a multiple of {plan.num_subnetworks} ranks"
        )
    if sdp.num_subnetworks is None and workers > MOST_UNASKED_SUBNETWORKS:
        raise ConfigError(
            f"{key}: {sdp.plan.file} is for {workers} workers; takes num_subnetworks {workers} beside it, as every "
            f"plan for more than {MOST_UNASKED_SUBNETWORKS}"
        )
    return plan


def _first_difference(mine: Sequence[UnitSpace], theirs: Sequence[UnitSpace]) -> tuple[str, str]:
    for left, right in itertools.zip_longest(mine, theirs):
        if left is None or right is None or _identity(left) != _identity(right):
            break
    describe = [
        f"{s.name} with {s.num_units} units of {s.unit_numel} parameters" if s else "nothing" for s in (left, right)
    ]
    return describe[0], describe[1]


def _identity(space: UnitSpace) -> tuple[object, ...]:
    return space.name, space.kind, space.num_units, space.unit_numel


def kinds_of(sdp: SDPConfig, adapter: Adapter) -> tuple[str, ...]:
    """The kinds of units that are partitioned.

    Raises:
        ConfigError: the block names one that the family does not have, or says a coverage for others.
    """
    known = tuple(adapter.units)
    kinds = sdp.partition or known
    named = f"{' and '.join(known)} in models of {adapter.name}"
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"{BLOCK}.partition: got {kind!r}; takes {named}")
    if sdp.granularity == "layer" and set(kinds) != set(known):
        raise ConfigError(
            f'{BLOCK}.partition: got {list(kinds)} with whole layers as units; takes {named}, or granularity "branch"'
        )
    if isinstance(sdp.coverage, Mapping) and sdp.granularity != "layer" and set(sdp.coverage) != set(kinds):
        raise ConfigError(
            f"{BLOCK}.coverage: got {json.dumps(sdp.coverage)}; takes a number for {' and '.join(kinds)}, as these are "
            "the kinds of units"
        )
    return kinds


def unit_spaces(model: nn.Module, sdp: SDPConfig, adapter: Adapter) -> list[UnitSpace]:
    """The unit spaces of :func:`partitioned`."""
    return [item.space for item in partitioned(model, sdp, adapter)]


def partitioned(model: nn.Module, sdp: SDPConfig, adapter: Adapter) -> Sequence[PartitionedModule | Block]:
    """What of ``model`` is partitioned: all but what all workers own.

    A pattern of ``shared_modules`` (``fnmatch``) shares a module and everything in it, e.g. ``"model.layers.0"`` or
    ``"*.self_attn"``; ``share_ends`` shares whole layers.

    Raises:
        ConfigError: a pattern matches no module, or only a part of a unit, or nothing is left to partition.
    """
    kinds, size = kinds_of(sdp, adapter), adapter.task.size(sdp.plan.seq_length)
    found: Sequence[PartitionedModule | Block] = (
        adapter.blocks(model, sdp.block_unit, kinds, size)
        if sdp.block_unit
        else adapter.partitioned_modules(model, kinds, size)
    )
    names = [name for name, _ in model.named_modules() if name]
    units = [item.space.name for item in found]
    for pattern in sdp.shared_modules:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ConfigError(
                f"subnetwork_data_parallel.shared_modules: got {pattern!r}, which matches no module of "
                f"{type(model).__name__}; takes name patterns such as {names[-1]!r}"
            )
        for name in matched:
            unit = next((unit for unit in units if name.startswith(f"{unit}.")), None)
            if unit and not _shares(pattern, unit):
                raise ConfigError(
                    f"subnetwork_data_parallel.shared_modules: got {pattern!r}, which matches {name}, a part of a "
                    f"unit; takes patterns of whole units such as {unit!r}"
                )
    patterns = (*sdp.shared_modules, *_ends(sdp.share_ends, adapter.layers(model), found))
    left = [item for item in found if not any(_shares(pattern, item.space.name) for pattern in patterns)]
    if not left:
        raise ConfigError("subnetwork_data_parallel.shared_modules: shares every unit; takes fewer patterns")
    return left


def _ends(number: int, layers: Sequence[Layer], found: Sequence[PartitionedModule | Block]) -> list[str]:
    """Names of the first ``number`` layers with units, and of the last."""
    with_units = sorted({item.space.layer for item in found})
    if 2 * number >= len(with_units):
        raise ConfigError(
            f"subnetwork_data_parallel.share_ends: got {number} with {len(with_units)} layers, of which none would be "
            f"left; takes up to {(len(with_units) - 1) // 2}"
        )
    return [layers[layer].name for layer in (*with_units[:number], *with_units[len(with_units) - number :])]


def shared_flops(model: nn.Module, sdp: SDPConfig, spaces: Sequence[UnitSpace]) -> float:
    """Training FLOPs per sample that every worker computes whatever it owns: the output head and shared modules."""
    adapter = find_adapter(model)
    every = adapter.partitioned_modules(model, tuple(adapter.units), adapter.task.size(sdp.plan.seq_length))
    partitioned = sum(space.num_units * space.unit_flops for space in spaces)
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    head_flops = matmul_flops(sum(p.numel() for p in head.parameters())) if head is not None else 0.0
    return head_flops + max(0.0, sum(m.space.num_units * m.space.unit_flops for m in every) - partitioned)


def _shares(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module ``name`` or one that it lies in."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
