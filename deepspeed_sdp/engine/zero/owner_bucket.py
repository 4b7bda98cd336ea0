"""A bucket and its owners: cut into equal shards over them, with the averaged gradients of this rank's shard.

Under backward masking those who hold a copy build it too; what concerns gradients is the owners' alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.groups import Group
from deepspeed_sdp.plan.segmentation import Bucket, shard_numel


class OwnerBucket(ABC):
    """Parameters of one owner set that travel together, seen as one flat vector in the order of the bucket.

    Where the weights lie is up to the subclass.

    Args:
        bucket: what it holds.
        weights: the weights themselves, one tensor per parameter, whole where the bucket has a range of it.
        ranks: global ranks of the owners, ascending.
        rank: this rank.
        group: the owners' process group, of which others than owners make no use.
        is_sharded: whether state is sharded over the owners (ZeRO 1 to 3), or whole on each of them (ZeRO 0).

    Attributes:
        average: ``[shard_numel]`` of averaged gradients; ``None`` when there are none.
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
        self.bucket = bucket
        self.ranks = ranks
        self.group = group
        self.is_owned = rank in ranks
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.shards = len(ranks) if is_sharded else 1
        self.index = ranks.index(rank) if is_sharded and self.is_owned else 0
        self.shard_numel = shard_numel(bucket.numel, self.shards)
        self.average: torch.Tensor | None = None

    @property
    def padded_numel(self) -> int:
        """Elements of all shards, with zero padding at the end."""
        return self.shards * self.shard_numel

    # -- gradients ---------------------------------------------------------------------------------------------------

    def flatten(self, values: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
        """One ``[padded_numel]`` tensor of ``dtype`` out of one whole gradient per parameter; ``None``: zeros."""
        flat = torch.empty(self.padded_numel, dtype=dtype, device=self.device)
        taken = 0
        for (_, start, stop), value in zip(self.bucket.ranges, values, strict=True):
            piece = flat[taken : taken + stop - start]
            if value is None:
                piece.zero_()
            else:
                copy_flat(piece, elements(value, start, stop))
            taken += stop - start
        flat[taken:].zero_()
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
        share, place = shard_numel(self.bucket.numel, len(self.ranks)), self.ranks.index(rank)
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


def elements(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Elements ``[start, stop)`` of ``tensor`` in row-major order, as views: whole rows and parts of at most two."""
    if tensor.is_contiguous() or tensor.dim() == 1:
        yield tensor.reshape(-1)[start:stop]
        return
    width = tensor[0].numel()
    row, column = divmod(start, width)
    if column:
        end = min(width, column + stop - start)
        yield from elements(tensor[row], column, end)
        start, row = start + end - column, row + 1
    rows = (stop - start) // width
    if rows:
        yield tensor[row : row + rows]
        start, row = start + rows * width, row + rows
    if start < stop:
        yield from elements(tensor[row], 0, stop - start)


def copy_flat(flat: torch.Tensor, pieces: Iterable[torch.Tensor]) -> None:
    """Fill ``flat`` with the elements of ``pieces``, one after the other."""
    taken = 0
    for piece in pieces:
        flat[taken : taken + piece.numel()].view(piece.shape).copy_(piece)
        taken += piece.numel()
