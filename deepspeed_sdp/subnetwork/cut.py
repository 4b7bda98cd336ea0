"""Cutting a full model down to the units that one worker owns.

The model is cut in place, as ``fully_shard`` shards in place: the modules stay transformers' own, only smaller.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from deepspeed_sdp.adapters import Adapter, Block, BlockUnit, PartitionedModule, PartitionedTensor, find_adapter
from deepspeed_sdp.adapters.base import is_linear
from deepspeed_sdp.errors import ModelError, PlanError
from deepspeed_sdp.plan import Chunk, SubnetworkPlan
from deepspeed_sdp.subnetwork.as_configured import check_hooks
from deepspeed_sdp.subnetwork.blocks import cut_block, scale_output
from deepspeed_sdp.subnetwork.client_map import ClientMap
from deepspeed_sdp.subnetwork.cutting import Cutting, replace_module
from deepspeed_sdp.subnetwork.full_model import FullModel
from deepspeed_sdp.subnetwork.layout import SHARED, Fragment, FullParameter
from deepspeed_sdp.subnetwork.linear import SubnetworkLinear, form_of, weight_and_bias
from deepspeed_sdp.subnetwork.mask import mask_block, mask_units
from deepspeed_sdp.subnetwork.pieces import cut_tensors
from deepspeed_sdp.subnetwork.subnetwork import Masking, Subnetwork

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
    kinds = tuple(adapter.units)
    modules = {module.space.name: module for module in adapter.partitioned_modules(model, kinds)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    by_unit = {
        t.name: FullParameter(t.name, tuple(tensors[t.name].shape), t.dim, t.width, module.space.name, t.groups)
        for module in modules.values()
        for t in module.tensors
    }
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
    blocks = {block.space.name: block for block in adapter.blocks(model, block_unit, kinds)} if block_unit else {}
    for planned in plan.spaces:
        found = (blocks if block_unit else modules).get(planned.space.name)
        if found is None or found.space.num_units != planned.space.num_units:
            got = f"{found.space.num_units} units" if found else "no such unit space"
            raise ModelError(
                f"plan: made for {planned.space.name} with {planned.space.num_units} units; the model has {got}"
            )
        cutting.writes.update(_writes(model, found))
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


def _writes(model: nn.Module, found: PartitionedModule | Block) -> Iterable[str]:
    if isinstance(found, Block):
        return found.writes
    if found.norm is not None:
        return [f"{found.norm}.{local}" for local, _ in model.get_submodule(found.norm).named_parameters()]
    return [tensor.name for tensor in found.tensors if tensor.is_write]


def _cut_module(cutting: Cutting, spec: PartitionedModule, scale: float) -> None:
    name = spec.space.name
    module = cutting.module.get_submodule(name)
    owned = cutting.plan.owned(name, cutting.index)
    if not owned:
        _replace_by_absent(cutting, spec, module)
        return
    for of_module, grouped in itertools.groupby(spec.tensors, lambda tensor: tensor.module):
        tensors = list(grouped)
        part = cutting.module.get_submodule(of_module)
        if is_linear(part):
            _replace_linear(cutting, of_module, part, tensors, owned, scale if spec.norm is None else 1.0)
        else:
            cut_tensors(cutting, of_module, tensors, owned)
            if scale != 1.0 and spec.norm is None and tensors[0].is_write:
                part.register_forward_hook(scale_output(scale))
    if scale != 1.0 and spec.norm is not None:
        cutting.module.get_submodule(spec.norm).register_forward_hook(scale_output(scale))
    for attribute, width in spec.widths:
        setattr(module, attribute, width * sum(chunk.stop - chunk.start for chunk in owned))


def _replace_by_absent(cutting: Cutting, spec: PartitionedModule, module: nn.Module) -> None:
    name = spec.space.name
    of_units = {tensor.name for tensor in spec.tensors}
    outside = next((tensor for tensor in of_units if not tensor.startswith(f"{name}.")), None)
    if outside is not None:
        raise PlanError(
            f"plan: worker {cutting.index} owns none of the {spec.space.num_units} units of {name}; takes plans in "
            f"which it owns some, as {outside} cannot be without"
        )
    writes = {f"{tensor.module}.bias" for tensor in spec.tensors if tensor.is_write}
    bias: nn.Parameter | None = None
    unused: list[nn.Parameter] = []
    for local, parameter in module.named_parameters():
        full_name = f"{name}.{local}"
        if full_name in of_units:
            cutting.partitioned[full_name] = cutting.full.by_unit[full_name]
            cutting.client.replaced.setdefault(id(parameter), [])
        elif full_name in writes:
            bias = parameter
            cutting.fragments[f"{name}.bias"] = Fragment(full_name, SHARED)
        else:
            cutting.fragments[f"{name}.unused.{len(unused)}"] = Fragment(full_name, SHARED)
            unused.append(parameter)
    replace_module(cutting.module, name, cutting.full.adapter.absent(spec.space.kind, module)(bias, unused))


def _replace_linear(
    cutting: Cutting,
    full_name: str,
    linear: nn.Module,
    tensors: Sequence[PartitionedTensor],
    owned: Sequence[Chunk],
    scale: float,
) -> None:
    fragments = cutting.fragments
    form = form_of(linear, tensors[0])
    weight, bias = weight_and_bias(linear)
    pieces: dict[str, list[Fragment]] = {}
    for tensor in tensors:
        full = cutting.full.by_unit[tensor.name]
        cutting.partitioned[tensor.name] = full
        pieces[tensor.local] = [full.fragment(chunk.start, chunk.stop, chunk.owner_set) for chunk in owned]
    weights = [cutting.slice(weight, fragment) for fragment in pieces["weight"]]
    biases = [cutting.slice(bias, fragment) for fragment in pieces.get("bias", []) if bias is not None]
    if isinstance(linear, nn.Linear) and len(weights) == form.groups == 1 and (form.cut == "out" or scale == 1.0):
        linear.weight = weights[0]
        fragments[f"{full_name}.weight"] = pieces["weight"][0]
        if biases:
            linear.bias = biases[0]
            fragments[f"{full_name}.bias"] = pieces["bias"][0]
        linear.out_features, linear.in_features = linear.weight.shape
        return
    if form.cut == "in" and bias is not None:
        biases = [bias]
        fragments[f"{full_name}.biases.0"] = Fragment(f"{full_name}.bias", SHARED)
    for kind in pieces:
        plural = "weights" if kind == "weight" else "biases"
        for i, fragment in enumerate(pieces[kind]):
            fragments[f"{full_name}.{plural}.{i}"] = fragment
    replacement = SubnetworkLinear(weights, biases, form, scale if form.cut == "in" else 1.0)
    replace_module(cutting.module, full_name, replacement)
