"""What a rank writes of other owners' training state, so that a checkpoint survives the loss of their files.

At ZeRO 0 every owner has all state of what it owns. At ZeRO 1 to 3 fp32 weights and optimizer state exist once, sharded
over the owners: a copy is sent to the next owner, one kind of a portion of the model at a time.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket


def exchange_copies(
    groups: OwnerGroups,
    device: torch.device,
    buckets: Sequence[OwnerBucket],
    own: Sequence[torch.Tensor],
    copy: int,
) -> list[torch.Tensor]:
    """Collective. For each of this rank's buckets, the shard of which it writes copy number ``copy``.

    Args:
        device: of the collective.
        own: this rank's shards of the buckets, each ``[shard_numel]`` and of one dtype.

    Returns:
        shards without padding.
    """
    # A rank and those who stand for it at other owners have one replica coordinate.
    rail = groups.for_weights
    order = sorted(range(len(buckets)), key=lambda place: buckets[place].key)
    outgoing: dict[int, list[int]] = {peer: [] for peer in rail.peers}
    incoming: dict[int, list[int]] = {peer: [] for peer in rail.peers}
    for place in order:
        outgoing[buckets[place].owners.next_owner(groups.rank, copy)].append(place)
        incoming[buckets[place].owners.next_owner(groups.rank, -copy)].append(place)
    dtype = own[0].dtype if own else torch.uint8
    pieces = [own[p][: _length(buckets[p], groups.rank)].to(device) for places in outgoing.values() for p in places]
    send = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=device)
    lengths = [_length(buckets[p], peer) for peer, places in incoming.items() for p in places]
    received = torch.empty(sum(lengths), dtype=dtype, device=device) if rail.outer else send
    if rail.outer:
        # As bytes: ranks without buckets do not know the dtype.
        size = dtype.itemsize
        sent = [sum(_length(buckets[p], groups.rank) for p in places) * size for places in outgoing.values()]
        sizes = [sum(_length(buckets[p], peer) for p in places) * size for peer, places in incoming.items()]
        with rail.outer.waiting("copies of the training state for a checkpoint") as group:
            dist.all_to_all_single(received.view(torch.uint8), send.view(torch.uint8), sizes, sent, group=group)
    places = [place for of_peer in incoming.values() for place in of_peer]
    shards = dict(zip(places, torch.split(received, lengths), strict=True))
    return [shards[place] for place in range(len(buckets))]


def _length(bucket: OwnerBucket, rank: int) -> int:
    start, stop = bucket.share_of(rank)
    return stop - start
