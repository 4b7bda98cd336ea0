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


def spectral_gap(owned: Iterable[tuple[tuple[int, ...], float]], num_workers: int) -> float:
    """`1 - λ₂(W)` in [0, 1] of the pairs `(S, mass)` of `owned`; 1 for a single worker.

    `D^-1/2 M D^-1/2` has the eigenvalues of `W = D^-1 M` and is symmetric, so they come out real and accurate. It is
    `B Bᵀ` with a column for each owner set, and `Bᵀ B` has the same eigenvalues but for zeros. The smaller of both is
    taken: few sets own what hundreds of workers hold.
    """
    pairs = list(owned)
    if num_workers == 1:
        return 1.0
    columns = np.zeros((num_workers, len(pairs)), dtype=np.float64)
    for column, (owners, weight) in enumerate(pairs):
        columns[list(owners), column] = np.sqrt(weight / len(owners))
    degree = columns**2 @ np.array([float(len(owners)) for owners, _ in pairs])
    if not degree.all():
        # A worker that owns nothing keeps what it has.
        return 0.0
    columns /= np.sqrt(degree)[:, None]
    mixing = columns.T @ columns if len(pairs) < num_workers else columns @ columns.T
    return 1.0 - second_eigenvalues(mixing[None])[0]


def second_eigenvalues(symmetric: Matrix) -> list[float]:
    """Of each of `[B, M, M]` symmetric matrices with eigenvalues in [0, 1] the second largest; 0 where `M` is 1."""
    if symmetric.shape[-1] == 1:
        return [0.0] * len(symmetric)
    return np.clip(np.linalg.eigvalsh(symmetric)[:, -2], 0.0, 1.0).tolist()  # type: ignore[no-any-return]


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
