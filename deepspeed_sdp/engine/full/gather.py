"""Putting full parameters together from the fragments of their owners. All functions are collective over the world."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.comm.traffic import Traffic, all_gather_bytes
from deepspeed_sdp.engine.comm.transport import start_all_gather
from deepspeed_sdp.plan import PlannedSpace
from deepspeed_sdp.subnetwork import FullParameter, Subnetwork, partitioned_by_space


def weights_dtype(subnetwork: Subnetwork) -> torch.dtype:
    """The dtype that the weights are trained in; equal on all ranks."""
    return next(p.dtype for name, p in subnetwork.module.named_parameters() if p.is_floating_point())


@dataclass(frozen=True)
class Access:
    """How an engine's weights are come by.

    Attributes:
        device: where full parameters are put together.
        groups: on which they travel.
        traffic: counts bytes sent.
        readable: a collective that makes this rank's weights of one layer readable inside; ``None``: those outside of
            the layers.
        full_scale: what the full model's writes are multiplied by when it is put together, under forward masking; see
            :mod:`deepspeed_sdp.engine.full.calibration`.
    """

    device: torch.device
    groups: OwnerGroups
    traffic: Traffic
    readable: Callable[[int | None], AbstractContextManager[None]]
    full_scale: float

    def scales(self, subnetwork: Subnetwork, name: str) -> bool:
        """Whether the full parameter ``name`` is multiplied by it."""
        return self.full_scale != 1.0 and subnetwork.masking == "forward" and name in subnetwork.writes


def shared_parameters(subnetwork: Subnetwork, layer: int | None, access: Access) -> dict[str, torch.Tensor]:
    """The full model's parameters of one layer (``None``: outside of the layers) that every rank owns whole, by name.

    Those that are not scaled are the rank's own, not copies.
    """
    layers = subnetwork.layer_names if layer is None else subnetwork.layer_names[layer : layer + 1]
    inside = tuple(f"{name}." for name in layers)
    shared = {
        subnetwork.fragments[name].full_name: p
        for name, p in subnetwork.module.named_parameters()
        if subnetwork.fragments[name].dim is None
    }
    # Those of other layers are not in memory at ZeRO-3.
    found = {name: p.detach() for name, p in shared.items() if name.startswith(inside) != (layer is None)}
    return {
        name: value * access.full_scale if access.scales(subnetwork, name) else value for name, value in found.items()
    }


def full_parameters(subnetwork: Subnetwork, access: Access) -> Iterator[Mapping[str, torch.Tensor]]:
    """Every parameter of the full model, on every rank, by full name: a few at a time, to be read before the next."""
    with access.readable(None):
        yield shared_parameters(subnetwork, None, access)
    for layer in range(len(subnetwork.layer_names)):
        with access.readable(layer):
            yield shared_parameters(subnetwork, layer, access)
            for planned in subnetwork.plan.spaces:
                if planned.space.layer == layer:
                    yield gather_space(subnetwork, planned, access)


def gather_space(subnetwork: Subnetwork, planned: PlannedSpace, access: Access) -> dict[str, torch.Tensor]:
    """The full parameters of one unit space, on every rank.

    Every owner of a chunk sends an equal share of it, and every rank as much as any other. Under backward masking every
    rank holds them already.

    Returns:
        full name -> tensor of the full shape on ``access.device``, in the dtype of training, times ``full_scale`` if
        it writes to the residual stream.
    """
    parameters = partitioned_by_space(subnetwork.partitioned)[planned.space.name]
    if subnetwork.masking == "backward":
        return {p.name: subnetwork.module.get_parameter(p.name).detach() for p in parameters}
    mine = {
        (subnetwork.fragments[name].full_name, subnetwork.fragments[name].start): p
        for name, p in subnetwork.module.named_parameters()
        if subnetwork.fragments[name].dim is not None
    }
    full = {p.name: _gather_parameter(subnetwork, planned, p, mine, access) for p in parameters}
    for parameter in parameters:
        if access.scales(subnetwork, parameter.name):
            full[parameter.name].mul_(access.full_scale)
    return full


def _gather_parameter(
    subnetwork: Subnetwork,
    planned: PlannedSpace,
    parameter: FullParameter,
    mine: Mapping[tuple[str, int], torch.Tensor],
    access: Access,
) -> torch.Tensor:
    everyone, dtype = access.groups.for_weights, weights_dtype(subnetwork)
    owner_sets, workers = subnetwork.plan.owner_sets, subnetwork.plan.num_subnetworks
    fragments = [parameter.fragment(chunk.start, chunk.stop, chunk.owner_set) for chunk in planned.chunks]
    numels = [int(torch.Size(parameter.fragment_shape(fragment)).numel()) for fragment in fragments]
    # A chunk's vector is cut like a bucket's, into slices and shards; a worker's shares lie in the order of the chunks.
    shares = [
        -(-numel // (everyone.replicas * len(owner_sets[fragment.owner_set])))
        for fragment, numel in zip(fragments, numels, strict=True)
    ]
    taken = [0] * workers
    places: list[dict[int, int]] = []
    for fragment, share in zip(fragments, shares, strict=True):
        places.append({worker: taken[worker] for worker in owner_sets[fragment.owner_set]})
        for worker in places[-1]:
            taken[worker] += share
    piece = torch.zeros(max(taken), dtype=dtype, device=access.device)
    for fragment, share, of_chunk in zip(fragments, shares, places, strict=True):
        if subnetwork.index in of_chunk:
            index = everyone.replica * len(of_chunk) + list(of_chunk).index(subnetwork.index)
            value = mine[parameter.name, fragment.start].detach().reshape(-1)[index * share : (index + 1) * share]
            piece[of_chunk[subnetwork.index] :][: len(value)] = value
    pieces = _all_gather(piece, access).view(everyone.replicas, workers, -1)
    full = torch.empty(parameter.shape, dtype=dtype, device=access.device)
    for fragment, share, numel, of_chunk in zip(fragments, shares, numels, places, strict=True):
        of_owners = [pieces[:, access.groups.place(worker), at : at + share] for worker, at in of_chunk.items()]
        flat = torch.stack(of_owners, dim=1).view(-1)[:numel]
        parameter.part_of(full, fragment).copy_(flat.view(parameter.fragment_shape(fragment)))
    return full


def _all_gather(piece: torch.Tensor, access: Access) -> torch.Tensor:
    """``piece`` of every rank, by replica and then by worker."""
    everyone = access.groups.for_weights
    for group in reversed(everyone.levels):
        whole = torch.empty(len(group.ranks) * len(piece), dtype=piece.dtype, device=piece.device)
        nbytes = whole.numel() * whole.element_size()
        access.traffic.add("full_gather", all_gather_bytes(nbytes, len(group.ranks)))
        with group.waiting("gathering the full model"):
            start_all_gather(whole, piece, group).wait()
        piece = whole
    return piece
