"""How fast averaging over owner sets spreads information between the workers.

With `W[w,w'] = 1/|U_w| · Σ_{u ∈ U_w ∩ U_w'} 1/|S_u|` the spectral gap is `1 - λ₂(W)`: 1 for data parallelism, 0 for
workers that fall into groups with nothing in common (as in gossip averaging; the subnetworks of arXiv 2507.09029).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def shared_mass(owned: Iterable[tuple[tuple[int, ...], float]], num_workers: int) -> Matrix:
    """`[N, N]` symmetric `M[w,w'] = Σ mass/|S|` over the pairs `(S, mass)` of `owned` with both workers in `S`.

    Row sums are what a worker owns, so `W` is `M` with its rows divided by them.
    """
    mass = np.zeros((num_workers, num_workers), dtype=np.float64)
    for owners, weight in owned:
        mass[np.ix_(owners, owners)] += weight / len(owners)
    return mass


def row_stochastic(mass: Matrix) -> Matrix:
    """`W` from `M`. A worker that owns nothing keeps what it has: its row is that of the identity."""
    degree = mass.sum(axis=1)
    idle = degree == 0
    mixing: Matrix = mass / np.where(idle, 1.0, degree)[:, None]
    mixing[idle, idle] = 1.0
    return mixing


def spectral_gap(mass: Matrix) -> float:
    """`1 - λ₂(W)` in [0, 1]; 1 for a single worker.

    `D^-1/2 M D^-1/2` has the eigenvalues of `W = D^-1 M` and is symmetric, so they come out real and accurate.
    """
    if len(mass) == 1:
        return 1.0
    degree = mass.sum(axis=1)
    idle = degree == 0
    scale = 1.0 / np.sqrt(np.where(idle, 1.0, degree))
    symmetric = mass * scale[:, None] * scale[None, :]
    symmetric[idle, idle] = 1.0
    return float(min(1.0, max(0.0, 1.0 - np.linalg.eigvalsh(symmetric)[-2])))


def spectral_gap_bound(num_workers: int, owners_per_unit: float) -> float:
    """`ρ* = 1 - (N-K) / (K(N-1))`: reached when all pairs of workers share equally much, beaten by no plan.

    The trace of `W` is `N/K` and its largest eigenvalue 1; the rest is least when it is spread evenly.
    """
    if num_workers == 1:
        return 1.0
    return 1.0 - (num_workers - owners_per_unit) / (owners_per_unit * (num_workers - 1))


def components(owner_sets: Iterable[tuple[int, ...]], num_workers: int) -> list[tuple[int, ...]]:
    """The groups of workers that are linked by common owner sets, each ascending, ordered by their first worker."""
    label = list(range(num_workers))
    for owners in owner_sets:
        merged = {label[w] for w in owners}
        target = min(merged)
        label = [target if seen in merged else seen for seen in label]
    return [tuple(w for w in range(num_workers) if label[w] == group) for group in sorted(set(label))]
