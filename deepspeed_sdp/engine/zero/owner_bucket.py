"""A bucket and its owners, cut into equal shards over them.

Under backward masking those who hold a copy build it too; what concerns gradients is the owners' alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.plan.segmentation import Bucket, shard_numel


class OwnerBucket(ABC):
    """Parameters of one owner set that travel together, seen as one flat vector in the order of the bucket.

    Where the weights lie is up to the subclass.

    Args:
        bucket: what it holds.
        weights: the weights themselves, one tensor per parameter, whole where the bucket has a range of it.
        owners: who owns it.
        is_sharded: whether state is sharded over the owners (ZeRO 1 to 3), or whole on each of them (ZeRO 0).

    Attributes:
        key, round: place in the total order of collectives.
        owner_set: index of the owner set.
        client_group: index of the client's parameter group.
        items, numels: index and elements of each parameter, in backward order; ``numel`` of all.
        ranges: ``(index, start, stop)`` of each of them: which of its elements, flattened.
        shard_numel, padded_numel: elements of this rank's shard, and of all shards, with zero padding at the end.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: Sequence[torch.Tensor],
        owners: Owners,
        is_sharded: bool,
    ) -> None:
        self.key, self.round = bucket.key, bucket.round
        self.owner_set, self.client_group = bucket.owner_set, bucket.group
        self.items, self.numels, self.numel = bucket.items, bucket.numels, bucket.numel
        self.ranges = tuple(bucket.ranges)
        self.owners = owners
        self.is_owned = owners.rank in owners
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.shards = len(owners.ranks) if is_sharded else 1
        self.index = owners.index(owners.rank) if is_sharded and self.is_owned else 0
        self.padded_numel = padded_numel(self.numel, owners, is_sharded)
        self.shard_numel = self.padded_numel // self.shards

    def share_of(self, rank: int) -> tuple[int, int]:
        """The half-open range of the flat vector that owner ``rank`` sends to those who hold a copy.

        At ZeRO 1 and 2 it is the owner's shard, without padding.
        """
        share, place = shard_numel(self.numel, len(self.owners.ranks)), self.owners.index(rank)
        return min(place * share, self.numel), min((place + 1) * share, self.numel)

    @abstractmethod
    def master(self, device: torch.device) -> nn.Parameter:
        """fp32 weights ``[shard_numel]`` of this rank's shard, for the optimizer; if possible the very weights."""

    @abstractmethod
    def places(self, master: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where the stepped master weights of this rank's shard go: views of the weights, each with its new values.

        Of one shape; nothing where the master weights are the weights.
        """

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Weights ``[start, stop)`` of the flat vector; may be a view of them."""

    @abstractmethod
    def write(self, start: int, values: torch.Tensor) -> None:
        """Put ``values`` in the place of the weights from ``start`` on."""


def padded_numel(numel: int, owners: Owners, is_sharded: bool) -> int:
    """Elements of all shards of a bucket of ``numel``; a whole one is cut too, into a slice for each replica."""
    pieces = len(owners.ranks) if is_sharded else owners.replicas
    return pieces * shard_numel(numel, pieces)
