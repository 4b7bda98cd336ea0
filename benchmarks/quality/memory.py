"""Memory of a rank beside the loss: bytes of model state by plan, and what autograd keeps of activations, measured."""

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.quality.ownership import make_plan
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.presets import model_path
from deepspeed_sdp.report.saved_activations import saved_activations
from deepspeed_sdp.subnetwork import cut_model, meta_model, plan_for, read_model_config

# bf16 weights and gradients; fp32 master and Adam's two moments
_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 2, 12


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most, and of the same model trained densely.

    Attributes:
        state: model state by ZeRO stage (0 and 1).
        activations: of one micro-batch in bf16; 0 where not measured.
    """

    state: dict[int, int]
    activations: int = 0


def state_bytes(plan: SubnetworkPlan, total: int, masking: str) -> dict[int, int]:
    """Model state of the rank that holds most, by ZeRO stage.

    Args:
        plan: of the model.
        total: its parameters.
        masking: under ``"backward"`` every rank has all weights.
    """
    workers = range(plan.num_subnetworks)
    shared = total - plan.total_numel
    held = {}
    for stage in (0, 1):
        sizes = []
        for w in workers:
            owned = shared + plan.owned_numel(w)
            weights = total if masking == "backward" else owned
            optimizer = owned if stage == 0 else shared / len(workers) + _shards(plan, w)
            sizes.append(_WEIGHT * weights + _GRADIENT * owned + _OPTIMIZER * optimizer)
        held[stage] = round(max(sizes))
    return held


def _shards(plan: SubnetworkPlan, worker: int) -> float:
    """Partitioned parameters whose state lies on a worker when every owner set shares its own."""
    shards = 0.0
    for planned in plan.spaces:
        for chunk in planned.chunks:
            owners = plan.owner_sets[chunk.owner_set]
            if worker in owners:
                shards += (chunk.stop - chunk.start) * planned.space.unit_numel / len(owners)
    return shards


def memory_of(model: nn.Module, sdp: SDPConfig, num_workers: int, ids: torch.Tensor, same_split: bool) -> Memory:
    """Of training a real ``model``, which is cut in place; activations are worker 0's for ``ids`` (``[B, T]``)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = make_plan(model, sdp, num_workers, same_split=same_split)
    state = state_bytes(plan, total, sdp.masking)
    model = model.to(torch.bfloat16)
    if plan.owners_per_unit != num_workers:
        cut_model(
            model,
            plan,
            0,
            masking=sdp.masking,
            output_scaling=sdp.output_scaling if sdp.masking == "forward" else "none",
            block_unit=sdp.block_unit,
        )
    with saved_activations(model) as activations:
        model(input_ids=ids, labels=ids, use_cache=False)
    return Memory(state, activations.total)


def preset_state(name: str, sdp: SDPConfig, num_workers: int) -> dict[int, int]:
    """Model state for a preset of the package."""
    model = meta_model(read_model_config(model_path(name, "preset")))
    total = sum(parameter.numel() for parameter in model.parameters())
    return state_bytes(plan_for(model, sdp, num_workers, "gloo"), total, sdp.masking)
