"""Backward masking: the model stays whole, and only what a worker owns takes gradients."""

import functools
from collections.abc import Sequence

from torch.utils.checkpoint import checkpoint

from deepspeed_sdp.adapters import Block, PartitionedLinear, PartitionedModule
from deepspeed_sdp.plan import Chunk
from deepspeed_sdp.subnetwork.gated_mlp import MaskedGatedMLP
from deepspeed_sdp.subnetwork.layout import FullParameter
from deepspeed_sdp.subnetwork.linear import LinearForm, is_transposed
from deepspeed_sdp.subnetwork.masked_linear import MaskedLinear
from deepspeed_sdp.subnetwork.subnetwork import Subnetwork, replace_module


def mask_units(subnetwork: Subnetwork, spec: PartitionedModule, chunks: Sequence[Chunk]) -> None:
    """Leave gradients to what this worker owns of one unit space; ``chunks`` are those of its plan."""
    for linear_spec in spec.linears:
        name = f"{spec.space.name}.{linear_spec.name}"
        fulls = [subnetwork.by_unit[n] for n in (f"{name}.weight", f"{name}.bias") if n in subnetwork.by_unit]
        for full in fulls:
            if len(chunks) == 1:
                _hold_whole(subnetwork, full, chunks[0])
            else:
                _hold_parts(subnetwork, full)
        if len(chunks) > 1:
            _mask_linear(subnetwork, name, linear_spec, fulls)
    if len(chunks) > 1:
        _keep_less(subnetwork, spec)


def mask_block(
    subnetwork: Subnetwork, block: Block, chunk: Chunk, inside: Sequence[PartitionedModule], recompute: bool
) -> None:
    """Train ``block`` if this worker owns it, else keep it frozen.

    Args:
        inside: the modules in it that could fall into units.
        recompute: compute a frozen block again in the backward pass, instead of keeping its activations.
    """
    space = block.space.name
    for name in (space, *block.norms):
        for local, parameter in subnetwork.module.get_submodule(name).named_parameters():
            # One unit, as wide as the parameter.
            full = FullParameter(f"{name}.{local}", tuple(parameter.shape), 0, parameter.shape[0], space)
            _hold_whole(subnetwork, full, chunk)
    if subnetwork.index in subnetwork.plan.owner_sets[chunk.owner_set]:
        return
    for spec in inside:
        _keep_less(subnetwork, spec)
    if recompute:
        module = subnetwork.module.get_submodule(space)
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _keep_less(subnetwork: Subnetwork, spec: PartitionedModule) -> None:
    if spec.is_gated:
        children = dict(subnetwork.module.get_submodule(spec.space.name).named_children())
        replace_module(subnetwork.module, spec.space.name, MaskedGatedMLP(**children))


def _hold_whole(subnetwork: Subnetwork, full: FullParameter, chunk: Chunk) -> None:
    """A parameter that is owned whole or not at all."""
    subnetwork.partitioned[full.name] = full
    subnetwork.fragments[full.name] = full.fragment(chunk.start, chunk.stop, chunk.owner_set)
    if subnetwork.index not in subnetwork.plan.owner_sets[chunk.owner_set]:
        _freeze(subnetwork, full)


def _hold_parts(subnetwork: Subnetwork, full: FullParameter) -> None:
    """A parameter of which workers own parts: whole it is nobody's."""
    subnetwork.partitioned[full.name] = full
    subnetwork.fragments[full.name] = full.whole()
    subnetwork.frozen.add(full.name)
    parameter = subnetwork.module.get_parameter(full.name)
    subnetwork.replaced.setdefault(id(parameter), [])


def _mask_linear(subnetwork: Subnetwork, name: str, spec: PartitionedLinear, fulls: Sequence[FullParameter]) -> None:
    owned = subnetwork.plan.owned(fulls[0].space, subnetwork.index)
    if not owned:
        for full in fulls:
            _freeze(subnetwork, full)
        return
    linear = subnetwork.module.get_submodule(name)
    width = spec.features_per_unit
    ranges = [(chunk.start * width, chunk.stop * width) for chunk in owned]
    masked = MaskedLinear(linear, LinearForm(spec.cut, is_transposed(linear), spec.groups), ranges, spec.is_input_kept)
    for full, kind, views in zip(fulls, ("weights", "biases"), (masked.weights, masked.biases), strict=False):
        subnetwork.replaced[id(subnetwork.module.get_parameter(full.name))] += views
        for i, chunk in enumerate(owned):
            subnetwork.fragments[f"{name}.{kind}.{i}"] = full.fragment(chunk.start, chunk.stop, chunk.owner_set)
            subnetwork.views[f"{name}.{kind}.{i}"] = full.name
    replace_module(subnetwork.module, name, masked)


def _freeze(subnetwork: Subnetwork, full: FullParameter) -> None:
    parameter = subnetwork.module.get_parameter(full.name)
    parameter.requires_grad_(False)
    subnetwork.replaced.setdefault(id(parameter), [])
    subnetwork.frozen.add(full.name)
