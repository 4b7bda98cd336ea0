"""Rectangles of full tensors: what one rank holds of the full model's weights and optimizer state."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Region:
    """A rectangle of a full tensor.

    Attributes:
        offsets: where it begins, one number per dimension.
        sizes: how far it reaches.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        product = 1
        for size in self.sizes:
            product *= size
        return product


@dataclass(frozen=True)
class Entry:
    """A rectangle of one logical tensor, and the memory that holds it.

    Attributes:
        name: of the logical tensor, e.g. ``"optimizer.exp_avg.model.layers.0.mlp.up_proj.weight"``.
        shape: of the logical tensor.
        region: which part of it.
        tensor: ``region.sizes``; may be a view.
        copy: 0 where the rectangle is written first, else which further copy of it this is.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    tensor: torch.Tensor
    copy: int = 0


def without_groups(region: Region, dim: int, width: int) -> Iterator[tuple[Region, int]]:
    """A rectangle of ``[..., groups, width, ...]`` as rectangles of ``[..., groups * width, ...]``, one for each group.

    Args:
        dim: that of the groups.
        width: of the full tensor's groups.

    Yields:
        a rectangle, and its place along ``dim`` in ``region``.
    """
    before, after = slice(None, dim), slice(dim + 2, None)
    for place in range(region.sizes[dim]):
        offset = (region.offsets[dim] + place) * width + region.offsets[dim + 1]
        yield (
            Region(
                (*region.offsets[before], offset, *region.offsets[after]),
                (*region.sizes[before], region.sizes[dim + 1], *region.sizes[after]),
            ),
            place,
        )


def regions_of_range(whole: Region, start: int, stop: int) -> Iterator[tuple[Region, int, int]]:
    """Elements ``[start, stop)`` of a rectangle, in row-major order, as rectangles.

    ZeRO cuts state at such ranges, with no regard to rows: whole rows are one rectangle, parts of rows stand beside it.

    Yields:
        a rectangle, and the range of elements that it is.
    """
    if start >= stop:
        return
    if len(whole.sizes) == 1:
        yield Region((whole.offsets[0] + start,), (stop - start,)), start, stop
        return
    row = Region(whole.offsets[1:], whole.sizes[1:])
    first, column = divmod(start, row.numel)
    if column:
        end = min(stop, (first + 1) * row.numel)
        yield from _in_row(whole, row, first, start, end)
        start, first = end, first + 1
    rows = (stop - start) // row.numel
    if rows > 0:
        end = start + rows * row.numel
        yield Region((whole.offsets[0] + first, *row.offsets), (rows, *row.sizes)), start, end
        start, first = end, first + rows
    if start < stop:
        yield from _in_row(whole, row, first, start, stop)


def _in_row(whole: Region, row: Region, place: int, start: int, stop: int) -> Iterator[tuple[Region, int, int]]:
    begin = place * row.numel
    for region, low, high in regions_of_range(row, start - begin, stop - begin):
        yield (
            Region((whole.offsets[0] + place, *region.offsets), (1, *region.sizes)),
            low + begin,
            high + begin,
        )
