"""A bucket in numbers: who owns it, and how it is cut into shards. Pure; ``estimate/`` counts by it."""

import torch

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.plan.segmentation import Bucket, shard_numel
from deepspeed_sdp.subnetwork import SHARED


class BucketShape:
    """Parameters of one owner set that travel together, seen as one flat vector in the order of the bucket.

    Args:
        bucket: what it holds.
        owners: who owns it.
        is_sharded: whether state is sharded over those who share it (ZeRO 1 to 3), or whole on each of them (ZeRO 0).

    Attributes:
        key, round: place in the total order of collectives.
        owner_set: index of the owner set.
        client_group: index of the client's parameter group.
        in_place: whether its weights are parts of larger ones.
        items, numels: index and elements of each parameter, in backward order; ``numel`` of all.
        ranges: ``(index, start, stop)`` of each of them: which of its elements, flattened.
        shards: so many ranks hold a part of its state each.
        shard_numel, padded_numel: elements of this rank's shard, and of all shards, with zero padding at the end.
    """

    def __init__(self, bucket: Bucket, owners: Owners, is_sharded: bool) -> None:
        self.key, self.round = bucket.key, bucket.round
        self.owner_set, self.client_group = bucket.owner_set, bucket.group
        self.in_place = bucket.in_place
        self.items, self.numels, self.numel = bucket.items, bucket.numels, bucket.numel
        self.ranges = tuple(bucket.ranges)
        self.owners = owners
        self.is_owned = owners.rank in owners
        self.shards = len(owners.sharers.ranks) if is_sharded else 1
        self.index = owners.sharers.index(owners.rank) if is_sharded and self.is_owned else 0
        self.padded_numel = padded_numel(self.numel, owners, is_sharded)
        self.shard_numel = self.padded_numel // self.shards

    @property
    def is_exchanged(self) -> bool:
        """Where others hold copies: whether it goes to all ranks, and not to its owners alone.

        What everyone owns is gathered like any weight, but where only the exchange knows where it lies.
        """
        return self.in_place or self.owner_set != SHARED

    def share_of(self, rank: int) -> tuple[int, int]:
        """The half-open range of the flat vector that owner ``rank`` sends to those who hold a copy.

        At ZeRO 1 and 2 it is the owner's shard, without padding, or a part of it where workers train apart.
        """
        share, place = shard_numel(self.numel, len(self.owners.ranks)), self.owners.index(rank)
        return min(place * share, self.numel), min((place + 1) * share, self.numel)

    def is_own_master(self, dtype: torch.dtype, is_beside: bool) -> bool:
        """Whether weights of ``dtype`` are their own fp32 master copy.

        In place they are not: an optimizer takes contiguous tensors, and columns are not.

        Args:
            is_beside: whether they rest on the device of the optimizer's state.
        """
        return dtype == torch.float32 and is_beside and not self.in_place


def padded_numel(numel: int, owners: Owners, is_sharded: bool) -> int:
    """Elements of all shards of a bucket of ``numel``; a whole one is cut too, into a slice for each replica."""
    pieces = len(owners.ranks) if is_sharded else owners.replicas
    return pieces * shard_numel(numel, pieces)
