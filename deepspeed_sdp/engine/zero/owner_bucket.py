"""A bucket and its owners: cut into equal shards over them, with the averaged gradients of this rank's shard.

Under backward masking those who hold a copy build it too; what concerns gradients is the owners' alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.plan.rounds import Bucket

# A shard's elements are a multiple of this, so that it starts at an aligned address in every dtype.
_ALIGNMENT = 8


class OwnerBucket(ABC):
    """Parameters of one owner set that travel together, seen as one flat vector in the order of the bucket.

    Where the weights lie is up to the subclass.

    Args:
        bucket: what it holds.
        weights: the weights themselves, one tensor per parameter.
        owners: who owns it.
        is_sharded: whether state is sharded over the owners (ZeRO 1 to 3), or whole on each of them (ZeRO 0).

    Attributes:
        average: ``[shard_numel]`` of averaged gradients; ``None`` when there are none.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: Sequence[torch.Tensor],
        owners: Owners,
        is_sharded: bool,
    ) -> None:
        self.bucket = bucket
        self.owners = owners
        self.is_owned = owners.rank in owners
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.shards = len(owners.ranks) if is_sharded else 1
        self.index = owners.index(owners.rank) if is_sharded and self.is_owned else 0
        # A whole shard is cut too, into a slice for each replica.
        self.shard_numel = self._share(self.shards) if is_sharded else self._share(owners.replicas) * owners.replicas
        self.average: torch.Tensor | None = None

    def _share(self, count: int) -> int:
        return -(-self.bucket.numel // (count * _ALIGNMENT)) * _ALIGNMENT

    @property
    def padded_numel(self) -> int:
        """Elements of all shards, with zero padding at the end."""
        return self.shards * self.shard_numel

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The piece ``[numel]`` of every parameter in a flat tensor ``[padded_numel]``."""
        return torch.split(flat.narrow(0, 0, self.bucket.numel), list(self.bucket.numels))

    # -- gradients ---------------------------------------------------------------------------------------------------

    def flatten(self, values: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
        """One ``[padded_numel]`` tensor of ``dtype`` out of one tensor per parameter; ``None`` counts as zeros."""
        flat = torch.empty(self.padded_numel, dtype=dtype, device=self.device)
        for piece, value in zip(self.split(flat), values, strict=True):
            piece.zero_() if value is None else piece.copy_(value.reshape(-1))
        flat.narrow(0, self.bucket.numel, self.padded_numel - self.bucket.numel).zero_()
        return flat

    def add_average(self, piece: torch.Tensor, dtype: torch.dtype) -> None:
        """Add ``piece`` ``[shard_numel]`` to the averaged gradients, held in ``dtype``."""
        if self.average is None:
            is_view = piece.untyped_storage().nbytes() > piece.numel() * piece.element_size()
            self.average = piece.to(dtype, copy=is_view)
        else:
            self.average += piece.to(dtype)

    # -- weights -----------------------------------------------------------------------------------------------------

    def share_of(self, rank: int) -> tuple[int, int]:
        """The half-open range of the flat vector that owner ``rank`` sends to those who hold a copy.

        At ZeRO 1 and 2 it is the owner's shard, without padding.
        """
        share, place = self._share(len(self.owners.ranks)), self.owners.index(rank)
        return min(place * share, self.bucket.numel), min((place + 1) * share, self.bucket.numel)

    @abstractmethod
    def master(self, device: torch.device) -> nn.Parameter:
        """fp32 weights ``[shard_numel]`` of this rank's shard, for the optimizer; if possible the very weights."""

    @abstractmethod
    def store(self, master: torch.Tensor) -> None:
        """Write the stepped master weights back into this rank's shard."""

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Weights ``[start, stop)`` of the flat vector; may be a view of them."""

    @abstractmethod
    def write(self, start: int, values: torch.Tensor) -> None:
        """Put ``values`` in the place of the weights from ``start`` on."""
