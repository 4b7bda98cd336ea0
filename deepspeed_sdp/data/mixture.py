"""Which source each sample is of, where several are mixed by weight."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from deepspeed_sdp.errors import ConfigError

_RANGE = 1 << 64
# The range over the golden ratio: its multiples, taken modulo the range, fall evenly over it.
_STEP = 0x9E3779B97F4A7C15


class Mixture:
    """Sample ``n`` is of a source that follows from ``n``, the weights and the seed alone.

    Samples have the same number of tokens, so weights are shares of tokens. Of any samples in a row each source has its
    share, to within a few samples: they are spread evenly rather than drawn.

    Args:
        weights: of the sources, in any unit.
        seed: where the sequence begins.

    Raises:
        ConfigError: a weight is not a positive number.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        for weight in weights:
            if not math.isfinite(weight) or weight <= 0:
                raise ConfigError(f"weight: got {weight}; takes a number above 0")
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self._edges = [int(edge * _RANGE) for edge in accumulate(self.shares)][:-1]
        self._first = int(np.random.default_rng(seed).integers(_RANGE >> 1))

    def of(self, sample: int) -> int:
        """The number of the source of one sample."""
        return bisect_right(self._edges, (self._first + sample * _STEP) % _RANGE)

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` are of each source."""
        found = [self.of(sample) for sample in range(samples)]
        return [found.count(source) for source in range(len(self.shares))]
