"""A bucket and its owners, cut into equal shards over them.

Under backward masking those who hold a copy build it too; what concerns gradients is the owners' alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.plan.segmentation import Bucket


class OwnerBucket(BucketShape, ABC):
    """A bucket with its weights. Where they lie is up to the subclass.

    Args:
        bucket, owners, is_sharded: see :class:`BucketShape`.
        weights: the weights themselves, one tensor per parameter, whole where the bucket has a range of it.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: Sequence[torch.Tensor],
        owners: Owners,
        is_sharded: bool,
    ) -> None:
        super().__init__(bucket, owners, is_sharded)
        self.dtype, self.device = weights[0].dtype, weights[0].device

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
