"""A bucket and its owners, cut into equal shards over them.

Under backward masking those who hold a copy build it too; what concerns gradients is the owners' alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.groups import Group
from deepspeed_sdp.plan.rounds import Bucket

# A shard's elements are a multiple of this, so that it starts at an aligned address in every dtype.
_ALIGNMENT = 8


class OwnerBucket(ABC):
    """Parameters of one owner set that travel together, seen as one flat vector in the order of the bucket.

    Where the weights lie is up to the subclass.

    Args:
        bucket: what it holds.
        weights: the weights themselves, one tensor per parameter.
        ranks: global ranks of the owners, ascending.
        rank: this rank.
        group: the owners' process group, of which others than owners make no use.
        is_sharded: whether state is sharded over the owners (ZeRO 1 to 3), or whole on each of them (ZeRO 0).

    Attributes:
        key, round: place in the total order of collectives.
        owner_set: index of the owner set.
        client_group: index of the client's parameter group.
        items, numels: index and elements of each parameter, in backward order; ``numel`` of all.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: Sequence[torch.Tensor],
        ranks: tuple[int, ...],
        rank: int,
        group: Group,
        is_sharded: bool,
    ) -> None:
        self.key, self.round = bucket.key, bucket.round
        self.owner_set, self.client_group = bucket.owner_set, bucket.group
        self.items, self.numels, self.numel = bucket.items, bucket.numels, bucket.numel
        self.ranks = ranks
        self.group = group
        self.is_owned = rank in ranks
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.shards = len(ranks) if is_sharded else 1
        self.index = ranks.index(rank) if is_sharded and self.is_owned else 0
        self.shard_numel = self._share(self.shards)

    def _share(self, count: int) -> int:
        return -(-self.numel // (count * _ALIGNMENT)) * _ALIGNMENT

    @property
    def padded_numel(self) -> int:
        """Elements of all shards, with zero padding at the end."""
        return self.shards * self.shard_numel

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The piece ``[numel]`` of every parameter in a flat tensor ``[padded_numel]``."""
        return torch.split(flat.narrow(0, 0, self.numel), list(self.numels))

    @property
    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """``(index, start, stop)`` of every parameter in it: which of its elements, flattened."""
        for index, numel in zip(self.items, self.numels, strict=True):
            yield index, 0, numel

    # -- weights -----------------------------------------------------------------------------------------------------

    def share_of(self, rank: int) -> tuple[int, int]:
        """The half-open range of the flat vector that owner ``rank`` sends to those who hold a copy.

        At ZeRO 1 and 2 it is the owner's shard, without padding.
        """
        share, place = self._share(len(self.ranks)), self.ranks.index(rank)
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
