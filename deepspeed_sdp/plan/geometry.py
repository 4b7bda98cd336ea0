"""Resolvable designs that are known in closed form: families of partitions of N workers into teams of K.

Over a whole family every two workers are team mates equally often, which makes the spectral gap the best possible one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice, product
from math import gcd
from random import Random

import numpy as np
from numpy.typing import NDArray

from deepspeed_sdp.plan.classes import ParallelClass, team_class
from deepspeed_sdp.plan.starters import rotated_starters

# Reduction polynomials over GF(2), as bit masks: the only fields of non-prime order with q² ≤ 64.
_POLYNOMIALS = {4: 0b111, 8: 0b1011}
# Above N = 64 the subspaces run into the thousands, and a subset is chosen anyway.
_MAX_CLASSES = 256


def known_classes(num_workers: int, team_size: int) -> list[ParallelClass]:
    """A pairwise-balanced family for `(N, K)`, `K` dividing `N`, or an empty list where none is known here."""
    n, k = num_workers, team_size
    if k == 1:
        return [team_class(range(n), 1)]
    if k == 2:
        return _round_robin(n)
    power_n, power_k = _prime_power(n), _prime_power(k)
    if power_n and power_k and power_n[0] == power_k[0]:
        return _affine(power_n[0], power_n[1], power_k[1])
    return (_hadamard_halves(n) if n == 2 * k else []) or rotated_starters(n, k)


def _round_robin(n: int) -> list[ParallelClass]:
    """The circle method: `n - 1` perfect matchings in which every pair meets once. `n` even."""
    rounds = []
    for r in range(n - 1):
        order = [n - 1, r]
        for i in range(1, n // 2):
            order += [(r + i) % (n - 1), (r - i) % (n - 1)]
        rounds.append(team_class(order, 2))
    return rounds


def crossing_pairs(n: int) -> list[ParallelClass]:
    """All pairs of one half of the workers with the other, as `n/2` perfect matchings. `n` even.

    The gap is 1/2, for any `n`. Where not all pairs fit, none is larger: of two workers `i, j` that share nothing, the
    vector `e_i - e_j` shows that `λ₂(W) ≥ 1/2`.
    """
    half = n // 2
    return [tuple((i, half + (i + r) % half) for i in range(half)) for r in range(half)]


def digit_classes(num_workers: int, team_size: int, seed: int) -> list[ParallelClass]:
    """Partitions for any `K` that divides `N`: a worker's team is a sum over its digits to the base `N/K`, modulo it.

    The last digit counts once, so teams are equally large; each of the others has a factor, and the factors make a
    class. Teams of two classes meet equally often where their factors at some place differ by what has no common
    divisor with the base, but for what `N` lacks to a power of it. A first digit of few values is mixed by the seed.
    """
    base = num_workers // team_size
    workers = np.arange(num_workers)
    places = [base]
    while places[-1] * base < num_workers:
        places.append(places[-1] * base)
    digits = [workers // place % base for place in places]
    rng = Random(seed)
    classes = []
    for number in range(min(_MAX_CLASSES, num_workers)):
        label = workers.copy()
        for place, digit in zip(places, digits, strict=True):
            if place is places[-1] and digit[-1] < base - 1:
                label += np.array(sorted(range(base), key=lambda _: rng.random()))[digit]
            else:
                label += number * base // place % base * digit
        classes.append(team_class(np.argsort(label % base, kind="stable").tolist(), team_size))
    return list(dict.fromkeys(classes))


def _affine(p: int, m: int, j: int) -> list[ParallelClass]:
    """Workers are the points of GF(p)^m; a class is the cosets of one j-dimensional subspace.

    Where GF(p)^m is a space over a larger field and `j` allows it, only the subspaces over that field are taken: far
    fewer classes with the same balance (5 instead of 35 for N = 16, K = 4).
    """
    extension = gcd(m, j)
    q = p**extension
    if extension > 1 and q not in _POLYNOMIALS:
        extension, q = 1, p
    dimension, codimension = m // extension, (m - j) // extension
    points = list(product(range(q), repeat=dimension))
    classes = []
    for equations in islice(_echelon_matrices(q, codimension, dimension), _MAX_CLASSES):
        cosets: dict[tuple[int, ...], list[int]] = {}
        for worker, point in enumerate(points):
            value = tuple(_dot(q, row, point) for row in equations)
            cosets.setdefault(value, []).append(worker)
        classes.append(tuple(sorted(tuple(coset) for coset in cosets.values())))
    return classes


def _echelon_matrices(q: int, rows: int, columns: int) -> Iterator[list[list[int]]]:
    """All reduced row echelon matrices of full rank over GF(q): each subspace, as the zeros of one, exactly once."""
    for pivots in combinations(range(columns), rows):
        free = [(r, c) for r in range(rows) for c in range(pivots[r] + 1, columns) if c not in pivots]
        for values in product(range(q), repeat=len(free)):
            matrix = [[int(c == pivots[r]) for c in range(columns)] for r in range(rows)]
            for (r, c), value in zip(free, values, strict=True):
                matrix[r][c] = value
            yield matrix


def _dot(q: int, left: list[int], right: tuple[int, ...]) -> int:
    """Inner product over GF(q), elements numbered `0 … q-1`."""
    if q not in _POLYNOMIALS:
        return sum(a * b for a, b in zip(left, right, strict=True)) % q
    total = 0
    for a, b in zip(left, right, strict=True):
        total ^= _multiply(q, a, b)
    return total


def _multiply(q: int, a: int, b: int) -> int:
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a >= q:
            a ^= _POLYNOMIALS[q]
        b >>= 1
    return result


def _hadamard_halves(n: int) -> list[ParallelClass]:
    """The `n - 1` splits into halves given by the signs of a Hadamard matrix's rows (a resolvable 3-design)."""
    matrix = _hadamard(n)
    if matrix is None:
        return []
    signs = matrix * matrix[0]
    return [
        team_class([*np.flatnonzero(row > 0).tolist(), *np.flatnonzero(row < 0).tolist()], n // 2) for row in signs[1:]
    ]


def _hadamard(n: int) -> NDArray[np.int64] | None:
    """A Hadamard matrix of order `n` by Paley's first construction or Sylvester's doubling, None if neither has it."""
    if n == 1:
        return np.ones((1, 1), dtype=np.int64)
    q = n - 1
    if q % 4 == 3 and _prime_power(q) == (q, 1):
        squares = {x * x % q for x in range(1, q)}
        matrix = np.ones((n, n), dtype=np.int64)
        matrix[1:, 0] = -1
        for i, j in product(range(q), repeat=2):
            matrix[i + 1, j + 1] = 1 if i == j or (i - j) % q in squares else -1
        return matrix
    half = _hadamard(n // 2) if n % 2 == 0 else None
    return None if half is None else np.block([[half, half], [half, -half]])


def _prime_power(n: int) -> tuple[int, int] | None:
    """`(p, m)` with `n = p^m`, or None."""
    p = next((d for d in range(2, n + 1) if n % d == 0), 0)
    m = 0
    while p and n % p == 0:
        n //= p
        m += 1
    return (p, m) if p and n == 1 else None
