"""Classes for `K` that does not divide `N`: base blocks developed over the ring of the workers (difference families).

A base block `B` is a set of `K` workers with equally many in each residue class modulo a stride `s`, a common divisor
of `N` and `K`. Its translates `B, B+s, B+2s, …` are a class: `N/s` owner sets, every worker in `K/s` of them. How often
two workers meet follows from the differences in `B`, and a few base blocks that complement each other meet all pairs
nearly equally often, some exactly (the planes of 7 and 13 points, the biplane of 11).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice, product
from math import comb, gcd
from random import Random

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.classes import ParallelClass
from deepspeed_sdp.plan.mixing import spectral_gap, spectral_gap_bound

Real = NDArray[np.float64]
Block = tuple[int, ...]
# From chosen base blocks to what should be small: `[blocks]`, with each of them besides.
Cost = Callable[[list[int]], Real]

# All base blocks are looked at up to this number, a sample beyond.
_MAX_BLOCKS = 8192
_SAMPLE = 1000
# Of larger designs fewer are drawn: their pair counts are so many numbers at most.
_MAX_COUNTS = 2_097_152
# Base blocks the choice is made from: those that mix best alone.
_SHORTLIST = 400
# Starting points of the choice, and rounds of exchanging one base block for a better one.
_STARTS, _ROUNDS = 8, 6
# A stride above 1 leaves a worker fewer chunks of every weight: taken if it reaches this share of the bound.
NEARLY_OPTIMAL = 0.98
# Classes are left out where this share of the best gap is had without them: each costs process groups.
ENOUGH = 0.99
# Costs and gaps are compared rounded, so that another LAPACK or libm does not choose another plan.
_DIGITS = 7


def developed_classes(num_workers: int, set_size: int, max_owner_sets: int, seed: int) -> list[ParallelClass]:
    """Classes of `N/s` sets of `K`, as few chunks per worker as still mix well; empty if no class fits.

    Args:
        num_workers: `N`.
        set_size: `K`, no divisor of `N`.
        max_owner_sets: at most this many sets over all classes.
        seed: of the sample of base blocks; only used where there are more than a few thousand.
    """
    n, k = num_workers, set_size
    bound = spectral_gap_bound(n, k)
    best: tuple[float, list[ParallelClass]] = (-1.0, [])
    for stride in sorted({gcd(n, k), 1}, reverse=True):
        limit = max_owner_sets * stride // n
        if limit:
            found = _search(n, k, stride, limit, seed)
            if found[0] > best[0]:
                best = found
            if best[0] >= NEARLY_OPTIMAL * bound:
                break
    return best[1]


def enough_gap(best: float, bound: float) -> float:
    """The gap at which no more classes are taken, if the best one that was found is `best`."""
    if best >= round(bound, _DIGITS):
        return best
    return max(ENOUGH * best, min(best, NEARLY_OPTIMAL * bound))


def _search(n: int, k: int, stride: int, limit: int, seed: int) -> tuple[float, list[ParallelClass]]:
    blocks = _base_blocks(n, k, stride, Random(seed))
    counts = _pair_counts(blocks, n, stride)
    flat = counts.reshape(len(blocks), -1)
    _, first = np.unique(flat, axis=0, return_index=True)
    alone = flat[first].astype(np.float64)
    order = first[np.argsort(np.var(alone, axis=1).round(_DIGITS), kind="stable")][:_SHORTLIST]
    counts, blocks = counts[order], [blocks[i] for i in order]
    classes = [develop(block, n, stride) for block in blocks]
    cost = _largest_eigenvalue(counts) if stride == 1 else _spread(counts)
    found: list[tuple[float, list[int]]] = []
    bound = spectral_gap_bound(n, k)
    for size in range(1, limit + 1):
        chosen = [_choose(cost, size, start) for start in range(min(_STARTS, len(blocks)))]
        gaps = [_gap([classes[i] for i in c], n) for c in chosen]
        pick = int(np.argmax(gaps))
        found.append((gaps[pick], chosen[pick]))
        if gaps[pick] >= round(bound, _DIGITS):
            break
    wanted = enough_gap(max(gap for gap, _ in found), bound)
    gap, picked = next(entry for entry in found if entry[0] >= wanted)
    return gap, [classes[i] for i in picked]


def develop(block: Block, num_workers: int, stride: int) -> ParallelClass:
    """The translates of a base block by multiples of the stride."""
    return tuple(tuple(sorted((w + by) % num_workers for w in block)) for by in range(0, num_workers, stride))


def _base_blocks(n: int, k: int, stride: int, rng: Random) -> list[Block]:
    """Blocks with `K/s` workers in each residue class modulo the stride; the first one is the window `0 … K-1`."""
    per_residue, ring = k // stride, n // stride
    if comb(ring - 1, per_residue - 1) * comb(ring, per_residue) ** (stride - 1) <= _MAX_BLOCKS:
        with_zero = [(0, *rest) for rest in combinations(range(1, ring), per_residue - 1)]
        choices = [with_zero, *[list(combinations(range(ring), per_residue))] * (stride - 1)]
        parts = product(*choices)
        return [_interleave(part, stride) for part in parts]
    blocks = [tuple(range(k))]
    for _ in range(min(_SAMPLE, _MAX_COUNTS // (n * stride))):
        drawn = [sorted(range(ring), key=lambda _: rng.random())[:per_residue] for _ in range(stride)]
        blocks.append(_interleave(drawn, stride))
    return blocks


def _interleave(parts: tuple[tuple[int, ...], ...] | list[list[int]], stride: int) -> Block:
    return tuple(sorted(stride * x + residue for residue, part in enumerate(parts) for x in part))


def _pair_counts(blocks: list[Block], n: int, stride: int) -> NDArray[np.int64]:
    """`[blocks, d, s, t]`: how often a worker of residue `s` meets the one of residue `t` that lies `d` strides on."""
    member = np.zeros((len(blocks), n), dtype=np.int64)
    member[np.arange(len(blocks))[:, None], np.array(blocks)] = 1
    by_residue = member.reshape(len(blocks), n // stride, stride)
    return np.stack(
        [np.einsum("bxs,bxt->bst", by_residue, np.roll(by_residue, -d, axis=1)) for d in range(n // stride)], axis=1
    )


def _largest_eigenvalue(counts: NDArray[np.int64]) -> Cost:
    """With stride 1 the eigenvalues of W are the Fourier transform of the counts, without that of the ones vector."""
    n = counts.shape[1]
    angles = 2.0 * np.pi * np.outer(np.arange(n), np.arange(1, n // 2 + 1)) / n
    spectra: Real = counts[:, :, 0, 0] @ np.cos(angles)
    return lambda chosen: (spectra + spectra[chosen].sum(axis=0)).max(axis=-1).round(_DIGITS)


def _spread(counts: NDArray[np.int64]) -> Cost:
    """Elsewhere the sum of the squared pair counts must do, here from the products of those of two blocks each."""
    flat = counts.reshape(len(counts), -1).astype(np.float64)
    products: Real = flat @ flat.T
    alone = np.diag(products)
    return lambda chosen: alone + 2.0 * products[:, chosen].sum(axis=1) + products[np.ix_(chosen, chosen)].sum()


def _choose(cost: Cost, size: int, start: int) -> list[int]:
    """`size` base blocks, greedily from one of them, then exchanged one by one while that helps."""
    chosen = [start]
    while len(chosen) < size:
        chosen.append(int(cost(chosen).argmin()))
    for _ in islice(range(_ROUNDS), _ROUNDS if size > 1 else 0):
        before = list(chosen)
        for i in range(size):
            costs = cost(chosen[:i] + chosen[i + 1 :])
            best = int(costs.argmin())
            if costs[best] < costs[chosen[i]]:
                chosen[i] = best
        if chosen == before:
            break
    return chosen


def _gap(classes: list[ParallelClass], num_workers: int) -> float:
    owned = [(owners, 1.0) for parallel_class in classes for owners in parallel_class]
    return round(spectral_gap(owned, num_workers), _DIGITS)
