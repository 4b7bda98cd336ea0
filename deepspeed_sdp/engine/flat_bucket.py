"""A bucket's weights in one flat tensor, and this rank's shard of it."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup

from deepspeed_sdp.engine.rounds import Bucket

# A shard's elements are a multiple of this, so that it starts at an aligned address in every dtype.
_ALIGNMENT = 8


class FlatBucket:
    """Parameters of one owner set as views of one flat tensor, cut into equal shards over the owners.

    The layout of FSDP's flat parameters (``torch.distributed.fsdp``), one per (round, owner set, client group).

    Args:
        bucket: what it holds.
        parameters: the parameters themselves; their data moves into the flat tensor.
        ranks: global ranks of the owners, ascending.
        rank: this rank.
        process_group: of the owners.
        is_sharded: whether state is sharded over the owners (ZeRO 1 to 3), or whole on each of them (ZeRO 0).

    Attributes:
        flat: ``[shards * shard_numel]``, weights in the dtype they are trained in; zero padding at the end.
        shard: ``[shard_numel]``, this rank's part. A view of :attr:`flat` until :meth:`keep_shard_only`.
        average: ``[shard_numel]`` of averaged gradients; ``None`` when there are none.
    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[nn.Parameter],
        ranks: tuple[int, ...],
        rank: int,
        process_group: ProcessGroup,
        is_sharded: bool,
    ) -> None:
        self.bucket = bucket
        self.parameters = tuple(parameters)
        self.ranks = ranks
        self.process_group: ProcessGroup | None = process_group
        self.shards = len(ranks) if is_sharded else 1
        self.index = ranks.index(rank) if is_sharded else 0
        self.shard_numel = -(-bucket.numel // (self.shards * _ALIGNMENT)) * _ALIGNMENT
        self.average: torch.Tensor | None = None
        self._is_resident = True
        first = parameters[0]
        self.flat = torch.zeros(self.padded_numel, dtype=first.dtype, device=first.device)
        for parameter, view in zip(self.parameters, self.split(self.flat), strict=True):
            view.copy_(parameter.data.reshape(-1))
            parameter.data = view.view(parameter.shape)
        self.shard = self.flat.narrow(0, self.index * self.shard_numel, self.shard_numel)

    @property
    def padded_numel(self) -> int:
        """Elements of :attr:`flat`."""
        return self.shards * self.shard_numel

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The piece ``[numel]`` of every parameter in a flat tensor ``[padded_numel]``."""
        return torch.split(flat.narrow(0, 0, self.bucket.numel), list(self.bucket.numels))

    def flatten(self, values: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
        """One ``[padded_numel]`` tensor of ``dtype`` out of one tensor per parameter; ``None`` counts as zeros."""
        flat = torch.empty(self.padded_numel, dtype=dtype, device=self.flat.device)
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

    # -- ZeRO 3: the flat tensor exists only while it is used ---------------------------------------------------------

    def keep_shard_only(self, device: torch.device) -> None:
        """Give the shard memory of its own on ``device`` and free the rest."""
        self.shard = self.shard.to(device, copy=True)
        self.free()

    def free(self) -> None:
        """Give the flat tensor's memory back. Parameters stay what they are, without data."""
        self.flat.untyped_storage().resize_(0)
        self._is_resident = False

    def allocate(self) -> None:
        """Give the flat tensor memory again, for the transport to fill."""
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        self._is_resident = True

    @property
    def is_resident(self) -> bool:
        """Whether the flat tensor has memory."""
        return self._is_resident
