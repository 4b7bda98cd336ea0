"""What a rank writes of other owners' training state, so that a checkpoint survives the loss of their files.

At ZeRO 0 every owner has all state of what it owns. At ZeRO 1 to 3 fp32 weights and optimizer state exist once, sharded
over the owners: a copy is sent to the next owner, a portion of the model at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket

Tensors = Mapping[str, torch.Tensor]
"""Logical kind -> values of a bucket, e.g. ``"master"`` and ``"optimizer.exp_avg"``."""


def copies_of_others(
    optimizer: SDPOptimizer,
    groups: OwnerGroups,
    number: int,
    tensors_of: Callable[[OwnerBucket], Tensors],
) -> Iterator[tuple[OwnerBucket, tuple[int, int], Tensors]]:
    """Collective. Copy ``number`` of every share: for each of this rank's buckets the one of which it writes the copy.

    Args:
        tensors_of: state of a bucket's shard, each ``[shard_numel]``; the same kinds in the same order on all ranks.

    Yields:
        bucket, range of its flat vector, and the values of that range; on the CPU where they came from another rank.
    """
    for portion in optimizer.refresh.portions:
        buckets = [bucket for buckets in portion.owned for bucket in buckets]
        sources = [bucket.owners.next_owner(groups.rank, -number) for bucket in buckets]
        shares = [bucket.share_of(source) for bucket, source in zip(buckets, sources, strict=True)]
        own = [tensors_of(bucket) for bucket in buckets]
        if optimizer.stage == 0:
            values: Sequence[Tensors] = [
                {kind: value[start:stop] for kind, value in tensors.items()}
                for tensors, (start, stop) in zip(own, shares, strict=True)
            ]
        else:
            values = _exchange(groups, optimizer.device, buckets, own, sources, number)
        yield from zip(buckets, shares, values, strict=True)


def _exchange(
    groups: OwnerGroups,
    device: torch.device,
    buckets: Sequence[OwnerBucket],
    own: Sequence[Tensors],
    sources: Sequence[int],
    number: int,
) -> list[Tensors]:
    """Send every share to the rank that writes its copy; as bytes, for the kinds may differ in dtype."""
    # A rank and those who stand for it at other owners have one replica coordinate.
    rail = groups.for_weights
    place_of = {rank: place for place, rank in enumerate(rail.peers)}
    outgoing: list[list[torch.Tensor]] = [[] for _ in rail.peers]
    incoming: list[list[int]] = [[] for _ in rail.peers]
    order = sorted(range(len(buckets)), key=lambda place: buckets[place].key)
    for place in order:
        bucket = buckets[place]
        target = place_of[bucket.owners.next_owner(groups.rank, number)]
        outgoing[target] += [_bytes(value[: _length(bucket, groups.rank)]) for value in own[place].values()]
        incoming[place_of[sources[place]]].append(place)
    sizes = [
        sum(_length(buckets[p], rank) * value.element_size() for p in places for value in own[p].values())
        for rank, places in zip(rail.peers, incoming, strict=True)
    ]
    pieces = [piece.to(device) for of_rank in outgoing for piece in of_rank]
    send = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device) if rail.outer else send
    if rail.outer:
        sent = [sum(map(len, of_rank)) for of_rank in outgoing]
        with rail.outer.waiting("copies of the training state for a checkpoint") as group:
            dist.all_to_all_single(received, send, sizes, sent, group=group)
    result: list[Tensors] = [{} for _ in buckets]
    for rank, places, flat in zip(rail.peers, incoming, torch.split(received.cpu(), sizes), strict=True):
        taken = 0
        for place in places:
            values = {}
            for kind, value in own[place].items():
                nbytes = _length(buckets[place], rank) * value.element_size()
                values[kind] = flat[taken : taken + nbytes].clone().view(value.dtype)
                taken += nbytes
            result[place] = values
    return result


def _length(bucket: OwnerBucket, rank: int) -> int:
    start, stop = bucket.share_of(rank)
    return stop - start


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)
