"""A bucket whose weights lie in one flat tensor."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.engine.zero.bucket_shape import padded_numel
from deepspeed_sdp.engine.zero.flat_weights import FlatWeights
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.plan.segmentation import Bucket


class FlatBucket(OwnerBucket):
    """A range of :class:`FlatWeights`: all of them, or a piece, where a parameter is cut.

    Args:
        weights: what it is a range of; see :func:`flat_buckets`.
        start: where the range begins.

    Attributes:
        shard: ``[shard_numel]``, this rank's part. A view of :attr:`flat` until :meth:`keep_shard_only`.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: FlatWeights,
        start: int,
        owners: Owners,
        is_sharded: bool,
    ) -> None:
        super().__init__(bucket, [weights.flat], owners, is_sharded)
        self.weights = weights
        self._start = start
        self.shard = self.flat.narrow(0, self.index * self.shard_numel, self.shard_numel)

    @property
    def flat(self) -> torch.Tensor:
        """``[padded_numel]``, weights in the dtype they are trained in; zero padding at the end. A view."""
        return self.weights.flat.narrow(0, self._start, self.padded_numel)

    def master(self, device: torch.device) -> nn.Parameter:
        if self.is_own_master(self.shard.dtype, self.shard.device == device):
            return nn.Parameter(self.shard)
        return nn.Parameter(self.shard.to(device, torch.float32, copy=True))

    def places(self, master: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if master.data_ptr() != self.shard.data_ptr():
            yield self.shard, master

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.flat[start:stop]

    def write(self, start: int, values: torch.Tensor) -> None:
        self.flat.narrow(0, start, len(values)).copy_(values)

    def keep_shard_only(self, device: torch.device, is_pinned: bool = False) -> None:
        """Give the shard memory of its own on ``device``, page-locked if asked: the weights may be freed."""
        shard = self.shard.to(device, copy=True)
        self.shard = get_accelerator().pin_memory(shard) if is_pinned else shard


def flat_buckets(
    pieces: Sequence[Bucket], parameters: Sequence[nn.Parameter], owners: Owners, is_sharded: bool
) -> list[FlatBucket]:
    """Buckets that lie one after the other in one flat tensor; all but the last fill their range.

    Args:
        parameters: by their index in ``pieces``.
    """
    own = [parameters[index] for index in dict.fromkeys(index for bucket in pieces for index in bucket.items)]
    starts = [0, *accumulate(bucket.numel for bucket in pieces[:-1])]
    weights = FlatWeights(own, starts[-1] + padded_numel(pieces[-1].numel, owners, is_sharded))
    return [
        FlatBucket(bucket, weights, start, owners, is_sharded) for bucket, start in zip(pieces, starts, strict=True)
    ]
