"""What a rank writes of other owners' training state, so that a checkpoint survives the loss of their files.

At ZeRO 0 every owner has all state of what it owns. At ZeRO 1 to 3 fp32 weights and optimizer state exist once, sharded
over the owners: a copy is sent to the next owner, one kind of a portion of the model at a time.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist

from deepspeed_sdp.engine.comm.groups import OwnerGroups
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
    world = len(groups.workers)
    outgoing: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    incoming: defaultdict[int, list[int]] = defaultdict(list)
    for place in sorted(range(len(buckets)), key=lambda place: buckets[place].key):
        bucket = buckets[place]
        target = groups.next_owner(groups.rank, bucket.ranks, copy)
        outgoing[target].append(own[place][: _length(bucket, groups.rank)].to(device))
        incoming[groups.next_owner(groups.rank, bucket.ranks, -copy)].append(place)
    pieces = [piece for rank in range(world) for piece in outgoing[rank]]
    dtype = own[0].dtype if own else torch.uint8
    send = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=device)
    lengths = [_length(buckets[place], rank) for rank in range(world) for place in incoming[rank]]
    received = torch.empty(sum(lengths), dtype=dtype, device=device)
    sizes = [sum(_length(buckets[place], rank) for place in incoming[rank]) for rank in range(world)]
    sent = [sum(map(len, outgoing[rank])) for rank in range(world)]
    # As bytes: ranks without buckets do not know the dtype.
    size = dtype.itemsize
    with groups.for_weights.waiting("copies of the training state for a checkpoint") as group:
        dist.all_to_all_single(
            received.view(torch.uint8), send.view(torch.uint8),
            [n * size for n in sizes], [n * size for n in sent], group=group,
        )  # fmt: skip
    places = [place for rank in range(world) for place in incoming[rank]]
    shards = dict(zip(places, torch.split(received, lengths), strict=True))
    return [shards[place] for place in range(len(buckets))]


def _length(bucket: OwnerBucket, rank: int) -> int:
    start, stop = bucket.share_of(rank)
    return stop - start
