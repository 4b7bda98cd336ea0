"""Which rank sees which sequence, and what a model without context pays for them."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from deepspeed_sdp.errors import DataError

Tokens = npt.NDArray[Any]


class RankSampler:
    """An endless order over ``num_sequences``, a fresh permutation every epoch, the same on every rank."""

    def __init__(self, num_sequences: int, seed: int = 0) -> None:
        self.num_sequences = num_sequences
        self.seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def batches(
        self, rank: int, world_size: int, batch_size: int, start_sample: int = 0
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Indices ``[batch_size]`` of this rank's micro-batches, from sample ``start_sample`` of the order on.

        The order does not depend on the number of ranks: a job goes on at the exact sample on any other. Within an
        epoch no index is dealt twice; a batch may reach over its end.

        Raises:
            DataError: there are fewer sequences than one global batch.
        """
        needed = world_size * batch_size
        if self.num_sequences < needed:
            raise DataError(
                f"text: {self.num_sequences} sequences are too few for one batch of {needed} ({world_size} ranks of "
                f"{batch_size}); give more text, a smaller seq_length or a smaller train_micro_batch_size_per_gpu"
            )
        return (self._samples(first, batch_size) for first in itertools.count(start_sample + rank * batch_size, needed))

    def _samples(self, first: int, count: int) -> npt.NDArray[np.int64]:
        epoch, position = divmod(first, self.num_sequences)
        found = self._order(epoch)[position : position + count]
        left = count - len(found)
        return np.concatenate([found, self._order(epoch + 1)[:left]]) if left else found

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.num_sequences)
        return self._orders[epoch]


def unigram_loss(train: Tokens, heldout: Tokens, vocab_size: int) -> float:
    """Entropy baseline: what the best model without context pays for the held-out tokens, in nats per token.

    Args:
        train: tokens of any shape, whose frequencies (plus one) make the distribution.
        heldout: packed sequences ``[n, T]``; the first token of each is not predicted and does not count.
        vocab_size: number of token ids.
    """
    counts = np.bincount(train.reshape(-1), minlength=vocab_size).astype(np.float64) + 1.0
    log_probabilities = np.log(counts) - math.log(counts.sum())
    return float(-log_probabilities[heldout[:, 1:]].mean())
