"""Backward masking: the model stays whole, and only what a worker owns takes gradients."""

from collections.abc import Sequence

from torch import nn

from deepspeed_sdp.adapters import Block, PartitionedLinear, PartitionedModule
from deepspeed_sdp.plan import Chunk
from deepspeed_sdp.subnetwork.layout import FullParameter
from deepspeed_sdp.subnetwork.masked_linear import MaskedLinear
from deepspeed_sdp.subnetwork.subnetwork import Subnetwork, replace_module


def mask_units(subnetwork: Subnetwork, spec: PartitionedModule | Block, chunks: Sequence[Chunk]) -> None:
    """Leave gradients to what this worker owns of one unit space, whose chunks are ``chunks``."""
    if isinstance(spec, Block):
        _mask_block(subnetwork, spec, chunks[0])
    else:
        _mask_module(subnetwork, spec, chunks)


def _mask_module(subnetwork: Subnetwork, spec: PartitionedModule, chunks: Sequence[Chunk]) -> None:
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


def _mask_block(subnetwork: Subnetwork, block: Block, chunk: Chunk) -> None:
    space = block.space.name
    for name in (space, *block.norms):
        for local, parameter in subnetwork.module.get_submodule(name).named_parameters():
            # One unit, as wide as the parameter.
            full = FullParameter(f"{name}.{local}", tuple(parameter.shape), 0, parameter.shape[0], space)
            _hold_whole(subnetwork, full, chunk)


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
    assert isinstance(linear, nn.Linear)
    width = spec.features_per_unit
    masked = MaskedLinear(linear, spec.cut, [(chunk.start * width, chunk.stop * width) for chunk in owned])
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
