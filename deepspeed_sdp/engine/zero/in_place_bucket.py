"""A bucket whose weights are parts of larger ones (backward masking)."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.groups import Group
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket, elements
from deepspeed_sdp.plan.segmentation import Bucket


class InPlaceBucket(OwnerBucket):
    """Rows and columns of full weights that one owner set owns; flat only while they travel.

    Every rank holds them: owners train them, the others keep a copy. The master weights have memory of their own, in
    fp32 training too: an optimizer takes contiguous tensors, and columns are not.

    Args:
        views: views of the full weights.
    """

    def __init__(
        self,
        bucket: Bucket,
        views: Sequence[torch.Tensor],
        ranks: tuple[int, ...],
        rank: int,
        group: Group,
        is_sharded: bool,
    ) -> None:
        super().__init__(bucket, views, ranks, rank, group, is_sharded)
        self._views = tuple(view.detach() for view in views)

    def master(self, device: torch.device) -> nn.Parameter:
        master = torch.zeros(self.shard_numel, dtype=torch.float32, device=device)
        start, stop = self._shard_range()
        master[: stop - start].copy_(self.read(start, stop))
        return nn.Parameter(master)

    def store(self, master: torch.Tensor) -> None:
        start, stop = self._shard_range()
        self.write(start, master[: stop - start].to(self.device, self.dtype))

    def read(self, start: int, stop: int) -> torch.Tensor:
        pieces = [piece.reshape(-1) for piece in self._pieces(start, stop)]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype, device=self.device)

    def write(self, start: int, values: torch.Tensor) -> None:
        taken = 0
        for piece in self._pieces(start, start + len(values)):
            piece.copy_(values[taken : taken + piece.numel()].view(piece.shape))
            taken += piece.numel()

    def _shard_range(self) -> tuple[int, int]:
        start = min(self.index * self.shard_numel, self.bucket.numel)
        return start, min(start + self.shard_numel, self.bucket.numel)

    def _pieces(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        first = 0
        for view, (_, begin, end) in zip(self._views, self.bucket.ranges, strict=True):
            low, high = max(begin + start - first, begin), min(begin + stop - first, end)
            if low < high:
                yield from elements(view, low, high)
            first += end - begin
