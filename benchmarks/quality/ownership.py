"""Who owns what in one step of the simulation, from the package's own plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.parts import Frozen, Owners, Part, Removed
from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.plan import Chunk, SubnetworkPlan
from deepspeed_sdp.subnetwork import plan_for
from deepspeed_sdp.subnetwork.cut import output_scale


@dataclass(frozen=True)
class OwnedBlock:
    """A residual block of which only ``owners`` have the weights.

    Attributes:
        owners: workers, ascending.
        scale: of what the block adds; 0 workers means that nobody has it.
        frozen: the others compute with it, without a gradient (backward masking).
    """

    owners: Owners
    scale: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class Ownership:
    """Of one step.

    Attributes:
        num_workers: ``N``.
        parts: how a branch runs, by module name; others run whole.
        blocks: those that not all workers have, by module name.
        counts: number of owners of a parameter's elements, in a shape that broadcasts to it; others have ``N``.
    """

    num_workers: int
    parts: Mapping[str, Part] = field(default_factory=dict)
    blocks: Mapping[str, OwnedBlock] = field(default_factory=dict)
    counts: Mapping[str, Tensor | float] = field(default_factory=dict)


def make_plan(model: nn.Module, sdp: SDPConfig, num_workers: int, *, same_split: bool = False) -> SubnetworkPlan:
    """The plan that the engine would make. ``same_split``: the same teams in every space, instead of a design."""
    plan = plan_for(model, sdp, num_workers, "gloo")
    return _same_split(plan) if same_split else plan


def _same_split(plan: SubnetworkPlan) -> SubnetworkPlan:
    """Every space cut alike, into windows of consecutive workers; blocks go to the windows in turn.

    Where ``K`` divides ``N`` such a plan leaves workers apart, which no design may, so it is not validated.
    """
    workers, owners = plan.num_subnetworks, plan.owners_per_unit
    if not isinstance(owners, int):
        raise ValueError(f"same_split: got coverage {owners}; takes one for all kinds")
    sets = [tuple(sorted((c + i) % workers for i in range(owners))) for c in range(0, workers, gcd(workers, owners))]
    spaces = []
    for i, planned in enumerate(plan.spaces):
        units = planned.space.num_units
        mine = range(1, len(sets) + 1) if units > 1 else [1 + i % len(sets)]
        size, rest = divmod(units, len(mine))
        if rest:
            raise ValueError(f"{planned.space.name}: {units} units do not fall into {len(mine)} equal chunks")
        chunks = tuple(Chunk(at * size, (at + 1) * size, owner_set) for at, owner_set in enumerate(mine))
        spaces.append(replace(planned, chunks=chunks))
    return replace(plan, spaces=tuple(spaces), owner_sets=(tuple(range(workers)), *sets), design="same split")


def ownership_of(model: nn.Module, plan: SubnetworkPlan, sdp: SDPConfig, shuffle: int | None = None) -> Ownership:
    """Who owns what under ``plan``.

    ``shuffle`` seeds a permutation of the workers, and of the units within every space: another plan as good as this.
    """
    generator = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    workers = range(plan.num_subnetworks)
    permuted = list(workers) if generator is None else torch.randperm(len(workers), generator=generator).tolist()
    parts: dict[str, Part] = {}
    blocks: dict[str, OwnedBlock] = {}
    counts: dict[str, Tensor | float] = {}
    is_block = sdp.block_unit is not None
    modules = {m.space.name: m for m in find_adapter(model).partitioned_modules(model, ("mlp", "attention"))}
    for planned in plan.spaces:
        space = planned.space
        owners = [tuple(sorted(permuted[w] for w in plan.owners(space.name, u))) for u in range(space.num_units)]
        if generator is not None:
            owners = [owners[i] for i in torch.randperm(len(owners), generator=generator).tolist()]
        scale = output_scale(sdp.output_scaling, plan, 0, space.kind) if sdp.masking == "forward" else 1.0
        if is_block:
            blocks[space.name] = OwnedBlock(owners[0], scale, sdp.masking == "backward")
            counts.update((name, float(len(owners[0]))) for name in _of_block(model, space.name))
            continue
        parts[space.name] = Removed(owners, len(workers), scale) if sdp.masking == "forward" else Frozen(owners)
        for tensor in modules[space.name].tensors:
            number = torch.tensor([float(len(s)) for s in owners]).repeat_interleave(tensor.width)
            counts[tensor.name] = number if tensor.dim else number[:, None]
    return Ownership(len(workers), parts, blocks, counts)


def dropped_blocks(layers: int, num_workers: int, rates: Sequence[float], generator: torch.Generator) -> Ownership:
    """Stochastic depth: every worker leaves every branch out with its layer's probability; weights are everyone's.

    What is kept counts ``1 / (1 - rate)``, so that its mean is the full model's.
    """
    blocks = {}
    for layer, rate in zip(range(layers), rates, strict=True):
        for branch in ("self_attn", "mlp"):
            kept = torch.rand(num_workers, generator=generator) >= rate
            blocks[f"model.layers.{layer}.{branch}"] = OwnedBlock(tuple(kept.nonzero()[:, 0].tolist()), 1 / (1 - rate))
    return Ownership(num_workers, blocks=blocks)


def _of_block(model: nn.Module, name: str) -> list[str]:
    """Parameters of a layer, or of a branch and its input norm."""
    layer, _, branch = name.rpartition(".")
    norm = {"self_attn": f"{layer}.input_layernorm.", "mlp": f"{layer}.post_attention_layernorm."}.get(branch, "")
    inside = (f"{name}.", norm) if norm else (f"{name}.",)
    return [parameter for parameter, _ in model.named_parameters() if parameter.startswith(inside)]


def flops_per_token(plan: SubnetworkPlan) -> float:
    """Training matmul FLOPs of a worker per token, mean over the workers."""
    workers = range(plan.num_subnetworks)
    return plan.shared_flops + sum(plan.owned_flops(w) for w in workers) / len(workers)


def parse_sdp(block: Mapping[str, Any], **plan: int) -> SDPConfig:
    """The block as a user writes it, with more keys of its block ``"plan"``."""
    return SDPConfig.parse({**block, "plan": {**block.get("plan", {}), **plan}})
