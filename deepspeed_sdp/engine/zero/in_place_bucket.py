"""A bucket whose weights are parts of larger ones (backward masking)."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from deepspeed_sdp.engine.comm.mesh import Owners
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
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
        owners: Owners,
        is_sharded: bool,
    ) -> None:
        super().__init__(bucket, views, owners, is_sharded)
        self._views = tuple(view.detach() for view in views)

    def master(self, device: torch.device) -> nn.Parameter:
        master = torch.zeros(self.shard_numel, dtype=torch.float32, device=device)
        start, stop = self._shard_range()
        master[: stop - start].copy_(self.read(start, stop))
        return nn.Parameter(master)

    def places(self, master: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        start, stop = self._shard_range()
        return self._pairs(start, master[: stop - start])

    def read(self, start: int, stop: int) -> torch.Tensor:
        pieces = [piece.reshape(-1) for piece in self._pieces(start, stop)]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype, device=self.device)

    def write(self, start: int, values: torch.Tensor) -> None:
        for piece, value in self._pairs(start, values):
            piece.copy_(value)

    def _pairs(self, start: int, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        taken = 0
        for piece in self._pieces(start, start + len(values)):
            yield piece, values[taken : taken + piece.numel()].view(piece.shape)
            taken += piece.numel()

    def _shard_range(self) -> tuple[int, int]:
        start = min(self.index * self.shard_numel, self.numel)
        return start, min(start + self.shard_numel, self.numel)

    def _pieces(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        first = 0
        for view, (_, begin, end) in zip(self._views, self.ranges, strict=True):
            low, high = max(begin + start - first, begin), min(begin + stop - first, end)
            if low < high:
                yield from _elements(view, low, high)
            first += end - begin


def _elements(view: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Elements ``[start, stop)`` of ``view`` in row-major order, as views: whole rows and parts of at most two."""
    if view.dim() == 1 or view.numel() == 0:
        yield view[start:stop]
        return
    width = view[0].numel()
    row, column = divmod(start, width)
    if column:
        end = min(width, column + stop - start)
        yield from _elements(view[row], column, end)
        start, row = start + end - column, row + 1
    rows = (stop - start) // width
    if rows:
        yield view[row : row + rows]
        start, row = start + rows * width, row + rows
    if start < stop:
        yield from _elements(view[row], 0, stop - start)
