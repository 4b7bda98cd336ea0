"""Cutting a full model down to the units that one worker owns.

The model is cut in place, as ``fully_shard`` shards in place: the modules stay transformers' own, only smaller.
"""

import copy
import math
from typing import Any, Literal

import torch
from torch import nn

from deepspeed_sdp.adapters import Adapter, Block, BlockUnit, PartitionedLinear, PartitionedModule, find_adapter
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork.as_configured import check_hooks
from deepspeed_sdp.subnetwork.blocks import cut_block
from deepspeed_sdp.subnetwork.client_map import ClientMap
from deepspeed_sdp.subnetwork.cutting import Cutting, replace_module
from deepspeed_sdp.subnetwork.full_model import FullModel
from deepspeed_sdp.subnetwork.layout import SHARED, Fragment, FullParameter
from deepspeed_sdp.subnetwork.linear import LinearForm, SubnetworkLinear, is_transposed, weight_and_bias
from deepspeed_sdp.subnetwork.mask import mask_block, mask_units
from deepspeed_sdp.subnetwork.subnetwork import Masking, Subnetwork

KINDS = ("mlp", "attention")

OutputScaling = Literal["none", "inverse_sqrt_coverage", "inverse_coverage"]


def cut_model(
    model: nn.Module,
    plan: SubnetworkPlan,
    index: int,
    *,
    masking: Masking = "forward",
    output_scaling: OutputScaling = "none",
    block_unit: BlockUnit | None = None,
    recompute_frozen: bool = False,
    adapter: Adapter | None = None,
    client: ClientMap | None = None,
) -> Subnetwork:
    """Cut ``model`` in place down to the subnetwork of worker ``index``; works on real and on meta parameters.

    Args:
        masking: ``"forward"`` removes what the worker does not own; ``"backward"`` keeps it, without gradients.
        output_scaling: for forward masking.
        block_unit: what a unit of the plan is at block granularity; ``None`` at neuron granularity.
        recompute_frozen: for backward masking of blocks, see :func:`~deepspeed_sdp.subnetwork.mask.mask_block`.
        client: of ``model``; learns what takes the place of its parameters.

    Raises:
        ModelError: no adapter knows the model, or the plan was made for other shapes.
    """
    adapter = adapter or find_adapter(model)
    modules = {module.space.name: module for module in adapter.partitioned_modules(model, KINDS)}
    by_unit: dict[str, FullParameter] = {}
    for module in modules.values():
        for spec in module.linears:
            by_unit.update(_full_parameters(model, module, spec))
    full = FullModel(
        adapter,
        type(model),
        copy.deepcopy(getattr(model, "config", None)),
        copy.deepcopy(getattr(model, "generation_config", None)),
        order=tuple(name for name, _ in model.named_parameters()),
        trainable=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        by_unit=by_unit,
    )
    cutting = Cutting(model, plan, index, full, masking, client or ClientMap(model))
    planned_names = {planned.space.name for planned in plan.spaces}
    check_hooks(model, (name for name, full in by_unit.items() if full.space in planned_names))
    blocks = {block.space.name: block for block in adapter.blocks(model, block_unit, KINDS)} if block_unit else {}
    for planned in plan.spaces:
        found = (blocks if block_unit else modules).get(planned.space.name)
        if found is None or found.space.num_units != planned.space.num_units:
            got = f"{found.space.num_units} units" if found else "no such unit space"
            raise ModelError(
                f"plan: made for {planned.space.name} with {planned.space.num_units} units; the model has {got}"
            )
        if masking == "backward" and isinstance(found, PartitionedModule):
            mask_units(cutting, found, planned.chunks)
        elif masking == "backward":
            assert isinstance(found, Block)
            inside = [spec for name, spec in modules.items() if f"{name}.".startswith(f"{found.space.name}.")]
            mask_block(cutting, found, planned.chunks[0], inside, recompute_frozen)
        elif isinstance(found, PartitionedModule):
            _cut_module(cutting, found, output_scale(output_scaling, plan, index, found.space.kind))
        else:
            cut_block(cutting, found, output_scale(output_scaling, plan, index, found.space.kind))
    config: Any = getattr(model, "config", None)
    if config is not None:
        # A cache of keys and values serves generation; a subnetwork only trains.
        config.use_cache = False
    return cutting.done()


def output_scale(output_scaling: OutputScaling, plan: SubnetworkPlan, worker: int, kind: str) -> float:
    """The factor on what the units of a kind that ``worker`` owns add to the residual stream."""
    powers = {"none": 0.0, "inverse_sqrt_coverage": 0.5, "inverse_coverage": 1.0}
    # The share of the kind's units that is due to this worker: K/N, unless workers differ in capacity.
    return math.pow(plan.shares(kind)[worker], -powers[output_scaling])


def _cut_module(cutting: Cutting, spec: PartitionedModule, scale: float) -> None:
    name = spec.space.name
    module = cutting.module.get_submodule(name)
    owned = cutting.plan.owned(name, cutting.index)
    for linear_spec in spec.linears:
        full_name = f"{name}.{linear_spec.name}"
        linear = module.get_submodule(linear_spec.name)
        full = {kind: cutting.full.by_unit.get(f"{full_name}.{kind}") for kind in ("weight", "bias")}
        cutting.partitioned.update({parameter.name: parameter for parameter in full.values() if parameter})
        if not owned:
            continue
        pieces = {
            kind: [parameter.fragment(c.start, c.stop, c.owner_set) for c in owned]
            for kind, parameter in full.items()
            if parameter
        }
        _replace_linear(cutting, full_name, linear, linear_spec, pieces, scale)
    if not owned:
        _replace_by_absent(cutting, spec, module)
        return
    for attribute, width in spec.widths:
        setattr(module, attribute, width * sum(chunk.stop - chunk.start for chunk in owned))


def _replace_by_absent(cutting: Cutting, spec: PartitionedModule, module: nn.Module) -> None:
    name = spec.space.name
    partitioned = {name for name in cutting.partitioned if name.startswith(f"{spec.space.name}.")}
    bias: nn.Parameter | None = None
    unused: list[nn.Parameter] = []
    for local, parameter in module.named_parameters():
        if f"{name}.{local}" in partitioned:
            cutting.client.replaced.setdefault(id(parameter), [])
        elif bias is None and any(local == f"{linear.name}.bias" for linear in spec.linears):
            bias = parameter
            cutting.fragments[f"{name}.bias"] = Fragment(f"{name}.{local}", SHARED)
        else:
            cutting.fragments[f"{name}.unused.{len(unused)}"] = Fragment(f"{name}.{local}", SHARED)
            unused.append(parameter)
    replace_module(cutting.module, name, cutting.full.adapter.absent(spec.space.kind)(bias, unused))


def _full_parameters(model: nn.Module, module: PartitionedModule, spec: PartitionedLinear) -> dict[str, FullParameter]:
    name = f"{module.space.name}.{spec.name}"
    linear = model.get_submodule(name)
    weight, bias = weight_and_bias(linear)
    width, space = spec.features_per_unit, module.space.name
    dim = 0 if (spec.cut == "out") != is_transposed(linear) else 1
    is_write = spec.cut == "in"
    parameters = [FullParameter(f"{name}.weight", tuple(weight.shape), dim, width, space, spec.groups, is_write)]
    if bias is not None and spec.cut == "out":
        parameters.append(FullParameter(f"{name}.bias", tuple(bias.shape), 0, width, space, spec.groups))
    return {parameter.name: parameter for parameter in parameters}


def _replace_linear(
    cutting: Cutting,
    full_name: str,
    linear: nn.Module,
    spec: PartitionedLinear,
    pieces: dict[str, list[Fragment]],
    scale: float,
) -> None:
    fragments = cutting.fragments
    weight, bias = weight_and_bias(linear)
    weights = [_slice(cutting, weight, fragment) for fragment in pieces["weight"]]
    biases = [_slice(cutting, bias, fragment) for fragment in pieces.get("bias", []) if bias is not None]
    if isinstance(linear, nn.Linear) and len(weights) == spec.groups == 1 and (spec.cut == "out" or scale == 1.0):
        linear.weight = weights[0]
        fragments[f"{full_name}.weight"] = pieces["weight"][0]
        if biases:
            linear.bias = biases[0]
            fragments[f"{full_name}.bias"] = pieces["bias"][0]
        linear.out_features, linear.in_features = linear.weight.shape
        return
    if spec.cut == "in" and bias is not None:
        biases = [bias]
        fragments[f"{full_name}.biases.0"] = Fragment(f"{full_name}.bias", SHARED)
    for kind in pieces:
        plural = "weights" if kind == "weight" else "biases"
        for i, fragment in enumerate(pieces[kind]):
            fragments[f"{full_name}.{plural}.{i}"] = fragment
    form = LinearForm(spec.cut, is_transposed(linear), spec.groups)
    replacement = SubnetworkLinear(weights, biases, form, scale if spec.cut == "in" else 1.0)
    replace_module(cutting.module, full_name, replacement)


def _slice(cutting: Cutting, parameter: torch.Tensor, fragment: Fragment) -> nn.Parameter:
    view = cutting.partitioned[fragment.full_name].part_of(parameter.detach(), fragment)
    piece = nn.Parameter(view.clone(memory_format=torch.contiguous_format), requires_grad=parameter.requires_grad)
    cutting.client.replaced.setdefault(id(parameter), []).append(piece)
    return piece
