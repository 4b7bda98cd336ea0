"""Runs of full tensors: what a flat bucket holds of the full model's weights and optimizer state."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from deepspeed_sdp.errors import CheckpointError

Rectangle = tuple[int, int, int, int]
"""First row and the one after the last, first column and the one after the last."""


@dataclass(frozen=True)
class Run:
    """Elements of a tensor of the full model that lie one after the other in a flat vector.

    The tensor is seen as a matrix: whatever dimension a plan cuts, what it cuts off is some columns of all rows. The
    run is a range of the elements of these columns, row by row.

    Attributes:
        name: of the parameter or buffer of the full model.
        shape: of the full tensor.
        rows: of the matrix that it is seen as.
        column, width: the first column, and how many there are.
        start, stop: half-open range of the ``rows * width`` elements of these columns.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    column: int
    width: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.stop - self.start

    @cached_property
    def span(self) -> tuple[int, int]:
        """Where in the full tensor its first element is, and the place after its last one."""
        numel = math.prod(self.shape)
        (top, left), (bottom, right) = divmod(self.start, self.width), divmod(self.stop - 1, self.width)
        first, last = (
            row * (numel // self.rows) + self.column + column for row, column in ((top, left), (bottom, right))
        )
        return first, last + 1

    def is_apart(self, other: "Run") -> bool:
        """Whether it is seen at once that two runs of a tensor have nothing in common; where it is not, see common."""
        if self.span[1] <= other.span[0] or other.span[1] <= self.span[0]:
            return True
        is_left = self.column + self.width <= other.column or other.column + other.width <= self.column
        return self.rows == other.rows and is_left

    def rectangles(self) -> Iterator[Rectangle]:
        """It as rectangles of the matrix: whole rows, and parts of at most two."""
        (top, left), (bottom, right) = divmod(self.start, self.width), divmod(self.stop, self.width)
        first, last = self.column, self.column + self.width
        if top == bottom:
            yield top, top + 1, first + left, first + right
            return
        if left:
            yield top, top + 1, first + left, last
            top += 1
        if top < bottom:
            yield top, bottom, first, last
        if right:
            yield bottom, bottom + 1, first, first + right

    def seen_as(self, rows: int) -> "Run":
        """The same elements of a matrix of ``rows`` rows.

        Raises:
            CheckpointError: they are some columns of another matrix.
        """
        if rows == self.rows:
            return self
        numel = math.prod(self.shape)
        if self.rows * self.width != numel or numel % rows:
            raise CheckpointError(f"checkpoint: {self.name} is cut along different dimensions")
        return replace(self, rows=rows, width=numel // rows)

    def view(self, values: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
        """The view of ``values`` ``[numel]``, which are this run's, that is a rectangle inside it."""
        top, bottom, left, right = rectangle
        offset = values.storage_offset() + top * self.width + left - self.column - self.start
        return values.as_strided((bottom - top, right - left), (self.width, 1), offset)


def whole(name: str, shape: Iterable[int]) -> Run:
    """All elements of a tensor."""
    shape = tuple(shape)
    return Run(name, shape, 1, 0, math.prod(shape), 0, math.prod(shape))


def cut(runs: Iterable[Run], start: int, stop: int) -> Iterator[Run]:
    """Elements ``[start, stop)`` of runs that lie one after the other."""
    for run in runs:
        low, high = max(start, 0), min(stop, run.numel)
        if low < high:
            yield replace(run, start=run.start + low, stop=run.start + high)
        start, stop = start - run.numel, stop - run.numel


def common(one: Run, other: Run) -> tuple[Run, Run, list[Rectangle]]:
    """Two runs of a tensor as runs of one matrix, and what both have, as rectangles.

    Raises:
        CheckpointError: they are cut along different dimensions.
    """
    if one.rows != other.rows:
        is_first = one.rows * one.width == math.prod(one.shape)
        one, other = (one.seen_as(other.rows), other) if is_first else (one, other.seen_as(one.rows))
    found = []
    for top, bottom, left, right in one.rectangles():
        for other_top, other_bottom, other_left, other_right in other.rectangles():
            both = (
                max(top, other_top), min(bottom, other_bottom),
                max(left, other_left), min(right, other_right),
            )  # fmt: skip
            if both[0] < both[1] and both[2] < both[3]:
                found.append(both)
    return one, other, found


@dataclass(frozen=True)
class Entry:
    """Runs of one kind, and the memory that holds them one after the other.

    Attributes:
        kind: ``"master"``, ``"optimizer.<key>"`` or ``"model"``.
        runs: of full tensors.
        tensor: ``[their elements]``, contiguous; may be a view.
    """

    kind: str
    runs: tuple[Run, ...]
    tensor: torch.Tensor

    def parts(self) -> Iterator[tuple[Run, torch.Tensor]]:
        """Every run, and its part of the memory."""
        first = 0
        for run in self.runs:
            yield run, self.tensor[first : first + run.numel]
            first += run.numel
