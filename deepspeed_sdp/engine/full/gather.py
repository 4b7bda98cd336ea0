"""Putting full parameters together from the fragments of their owners. All functions are collective over the world."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.groups import Group
from deepspeed_sdp.plan import Chunk, PlannedSpace
from deepspeed_sdp.subnetwork import FullParameter, Subnetwork, partitioned_by_space


def weights_dtype(subnetwork: Subnetwork) -> torch.dtype:
    """The dtype that the weights are trained in; equal on all ranks."""
    return next(p.dtype for name, p in subnetwork.module.named_parameters() if p.is_floating_point())


@dataclass(frozen=True)
class Access:
    """How an engine's weights are come by.

    Attributes:
        device: where full parameters are put together.
        group: of all ranks, on which they travel.
        readable: a collective that makes this rank's weights of one layer readable inside; ``None``: those outside of
            the layers.
        full_scale: what the full model's writes are multiplied by when it is put together, under forward masking; see
            :mod:`deepspeed_sdp.engine.full.calibration`.
    """

    device: torch.device
    group: Group
    readable: Callable[[int | None], AbstractContextManager[None]]
    full_scale: float


def layers_name(subnetwork: Subnetwork) -> str:
    """Name of the list of decoder layers."""
    layers = subnetwork.adapter.layers(subnetwork.module)
    names: dict[int, str] = {id(module): name for name, module in subnetwork.module.named_modules()}
    return names[id(layers)]


def shared_parameters(subnetwork: Subnetwork, layer: int | None) -> dict[str, torch.Tensor]:
    """The parameters of one layer (``None``: outside of the layers) that every rank owns whole, by full name."""
    inside = f"{layers_name(subnetwork)}."
    prefix = inside if layer is None else f"{inside}{layer}."
    shared = {
        subnetwork.fragments[name].full_name: p
        for name, p in subnetwork.module.named_parameters()
        if subnetwork.fragments[name].dim is None
    }
    return {name: p.detach() for name, p in shared.items() if name.startswith(prefix) != (layer is None)}


def full_parameters(subnetwork: Subnetwork, access: Access) -> Iterator[Mapping[str, torch.Tensor]]:
    """Every parameter of the full model, on every rank, by full name: a few at a time, to be read before the next."""
    with access.readable(None):
        yield shared_parameters(subnetwork, None)
    for layer in range(len(subnetwork.adapter.layers(subnetwork.module))):
        with access.readable(layer):
            yield shared_parameters(subnetwork, layer)
            for planned in subnetwork.plan.spaces:
                if planned.space.layer == layer:
                    yield gather_space(subnetwork, planned, access)


def gather_space(subnetwork: Subnetwork, planned: PlannedSpace, access: Access) -> dict[str, torch.Tensor]:
    """The full parameters of one unit space, on every rank.

    One broadcast per chunk, from one of its owners; owners take turns over the layers, so that none sends most. Under
    backward masking every rank holds them already.

    Returns:
        full name -> tensor of the full shape on ``access.device``, in the dtype of training, times ``full_scale`` if
        it writes to the residual stream.
    """
    parameters = partitioned_by_space(subnetwork.partitioned)[planned.space.name]
    if subnetwork.masking == "backward":
        return {p.name: subnetwork.module.get_parameter(p.name).detach() for p in parameters}
    dtype = weights_dtype(subnetwork)
    full = {p.name: torch.empty(p.shape, dtype=dtype, device=access.device) for p in parameters}
    mine = {
        (subnetwork.fragments[name].full_name, subnetwork.fragments[name].start): p
        for name, p in subnetwork.module.named_parameters()
        if subnetwork.fragments[name].dim is not None
    }
    for chunk in planned.chunks:
        owners = subnetwork.plan.owner_sets[chunk.owner_set]
        source = subnetwork.first_ranks[owners[planned.space.layer % len(owners)]]
        flat = _broadcast_chunk(parameters, chunk, source, mine, dtype, access)
        sizes = [_numel(p, chunk) for p in parameters]
        for parameter, piece in zip(parameters, torch.split(flat, sizes), strict=True):
            fragment = parameter.fragment(chunk.start, chunk.stop, chunk.owner_set)
            part = parameter.part_of(full[parameter.name], fragment)
            part.copy_(piece.view(parameter.fragment_shape(fragment)))
    if access.full_scale != 1.0:
        for parameter in parameters:
            if parameter.is_write:
                full[parameter.name].mul_(access.full_scale)
    return full


def _broadcast_chunk(
    parameters: list[FullParameter],
    chunk: Chunk,
    source: int,
    mine: Mapping[tuple[str, int], torch.Tensor],
    dtype: torch.dtype,
    access: Access,
) -> torch.Tensor:
    if dist.get_rank() == source:
        flat = torch.cat([mine[p.name, chunk.start * p.features_per_unit].detach().reshape(-1) for p in parameters])
        flat = flat.to(device=access.device, dtype=dtype)
    else:
        flat = torch.empty(sum(_numel(p, chunk) for p in parameters), dtype=dtype, device=access.device)
    if dist.get_world_size() > 1:
        with access.group.waiting("gathering the full model") as group:
            dist.broadcast(flat, src=source, group=group)
    return flat


def _numel(parameter: FullParameter, chunk: Chunk) -> int:
    shape = parameter.fragment_shape(parameter.fragment(chunk.start, chunk.stop, chunk.owner_set))
    return int(torch.Size(shape).numel())
