"""Backward masking: the model stays whole, and only what a worker owns takes gradients."""

import functools
import itertools
from collections.abc import Sequence

from torch.utils.checkpoint import checkpoint

from deepspeed_sdp.adapters import Block, PartitionedModule, PartitionedTensor
from deepspeed_sdp.adapters.base import is_linear
from deepspeed_sdp.plan import Chunk
from deepspeed_sdp.subnetwork.cutting import Cutting, replace_module
from deepspeed_sdp.subnetwork.gated_mlp import MaskedGatedMLP
from deepspeed_sdp.subnetwork.layout import FullParameter
from deepspeed_sdp.subnetwork.linear import form_of
from deepspeed_sdp.subnetwork.masked_linear import MaskedLinear
from deepspeed_sdp.subnetwork.pieces import mask_tensor


def mask_units(cutting: Cutting, spec: PartitionedModule, chunks: Sequence[Chunk]) -> None:
    """Leave gradients to what this worker owns of one unit space; ``chunks`` are those of its plan."""
    for name, grouped in itertools.groupby(spec.tensors, lambda tensor: tensor.module):
        # Statistics of the whole model: every worker computes them.
        parameters = cutting.module.get_submodule(name)._parameters
        tensors = [tensor for tensor in grouped if tensor.local in parameters]
        for tensor in tensors:
            full = cutting.full.by_unit[tensor.name]
            if len(chunks) == 1:
                _hold_whole(cutting, full, chunks[0])
            else:
                _hold_parts(cutting, full)
        if len(chunks) > 1:
            _mask_parts(cutting, name, tensors)
    if len(chunks) > 1:
        _keep_less(cutting, spec)


def mask_block(
    cutting: Cutting, block: Block, chunk: Chunk, inside: Sequence[PartitionedModule], recompute: bool
) -> None:
    """Train ``block`` if this worker owns it, else keep it frozen.

    Args:
        inside: the modules in it that could fall into units.
        recompute: compute a frozen block again in the backward pass, instead of keeping its activations.
    """
    space = block.space.name
    for name in (space, *block.norms):
        for local, parameter in cutting.module.get_submodule(name).named_parameters():
            # One unit, as wide as the parameter.
            full = FullParameter(f"{name}.{local}", tuple(parameter.shape), 0, parameter.shape[0], space)
            _hold_whole(cutting, full, chunk)
    if cutting.index in cutting.plan.owner_sets[chunk.owner_set]:
        return
    for spec in inside:
        _keep_less(cutting, spec)
    if recompute:
        module = cutting.module.get_submodule(space)
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _keep_less(cutting: Cutting, spec: PartitionedModule) -> None:
    if spec.is_gated:
        children = dict(cutting.module.get_submodule(spec.space.name).named_children())
        replace_module(cutting.module, spec.space.name, MaskedGatedMLP(**children))


def _hold_whole(cutting: Cutting, full: FullParameter, chunk: Chunk) -> None:
    """A parameter that is owned whole or not at all."""
    cutting.partitioned[full.name] = full
    cutting.fragments[full.name] = full.fragment(chunk.start, chunk.stop, chunk.owner_set)
    if cutting.index not in cutting.plan.owner_sets[chunk.owner_set]:
        _freeze(cutting, full)


def _hold_parts(cutting: Cutting, full: FullParameter) -> None:
    """A parameter of which workers own parts: whole it is nobody's."""
    cutting.partitioned[full.name] = full
    cutting.fragments[full.name] = full.whole()
    cutting.frozen.add(full.name)
    parameter = cutting.module.get_parameter(full.name)
    cutting.client.replaced.setdefault(id(parameter), [])


def _mask_parts(cutting: Cutting, name: str, tensors: Sequence[PartitionedTensor]) -> None:
    fulls = [cutting.full.by_unit[tensor.name] for tensor in tensors]
    owned = cutting.plan.owned(fulls[0].space, cutting.index)
    if not owned:
        for full in fulls:
            _freeze(cutting, full)
        return
    module = cutting.module.get_submodule(name)
    if not is_linear(module):
        for full in fulls:
            mask_tensor(cutting, full, owned)
        return
    width = tensors[0].width
    ranges = [(chunk.start * width, chunk.stop * width) for chunk in owned]
    masked = MaskedLinear(module, form_of(module, tensors[0]), ranges, tensors[0].is_input_kept)
    for full, kind, views in zip(fulls, ("weights", "biases"), (masked.weights, masked.biases), strict=False):
        cutting.client.replaced[id(cutting.module.get_parameter(full.name))] += views
        for i, chunk in enumerate(owned):
            cutting.fragments[f"{name}.{kind}.{i}"] = full.fragment(chunk.start, chunk.stop, chunk.owner_set)
            cutting.views[f"{name}.{kind}.{i}"] = full.name
    replace_module(cutting.module, name, masked)


def _freeze(cutting: Cutting, full: FullParameter) -> None:
    parameter = cutting.module.get_parameter(full.name)
    parameter.requires_grad_(False)
    cutting.client.replaced.setdefault(id(parameter), [])
    cutting.frozen.add(full.name)
