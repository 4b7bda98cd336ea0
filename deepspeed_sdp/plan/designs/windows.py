"""Windows around a ring of the workers: the owner sets of one layer, in every design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.gap import spectral_gap
from deepspeed_sdp.plan.units import OwnerSet


@dataclass(frozen=True)
class Windows:
    """The windows of `size` consecutive workers of a ring, one at every `stride` places.

    Every worker is in `size / stride` of them, one after the other. With `stride = size` they are teams: a partition.

    Attributes:
        order: the workers around the ring.
        size: `K`.
        stride: a common divisor of `N` and `K`.
    """

    order: tuple[int, ...]
    size: int
    stride: int

    @cached_property
    def owner_sets(self) -> tuple[OwnerSet, ...]:
        """The windows, in the order in which they start."""
        n = len(self.order)
        return tuple(
            tuple(sorted(self.order[(first + i) % n] for i in range(self.size))) for first in range(0, n, self.stride)
        )

    @property
    def per_worker(self) -> int:
        """In how many windows each worker is."""
        return self.size // self.stride

    @cached_property
    def laps(self) -> list[list[int]]:
        """Indices of windows that lie end to end around the ring, until the next one would be the first again.

        Any run of a lap covers all workers equally often, within one, and a whole lap equally often.
        """
        count, step = len(self.owner_sets), self.per_worker
        number = gcd(count, step)
        return [[(first + step * i) % count for i in range(count // number)] for first in range(number)]

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """`[windows, size]`: the owner sets."""
        return np.array(self.owner_sets)


def widest_stride(num_workers: int, owners: int) -> int:
    """The stride with the fewest windows, so that a worker holds the fewest chunks; their laps are one."""
    return gcd(num_workers, owners)


def windows(order: Sequence[int], owners: int) -> Windows:
    """Those of the widest stride."""
    return Windows(tuple(order), owners, widest_stride(len(order), owners))


def shifted_windows(num_workers: int, owners: int, most: int) -> tuple[Windows, ...]:
    """Windows of consecutive workers, from worker 0 on, from worker 1 on, … up to `most`, each window once."""
    n = num_workers
    return tuple(windows([*range(c, n), *range(c)], owners) for c in range(min(widest_stride(n, owners), most)))


def joint_gap(classes: Sequence[Windows]) -> float:
    """`1 - λ₂(W)` of a model whose unit spaces are equally large and use every class equally often."""
    return spectral_gap([(owners, 1.0) for ring in classes for owners in ring.owner_sets], len(classes[0].order))
