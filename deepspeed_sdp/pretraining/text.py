"""Where the batches of a job come from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from deepspeed_sdp.data import RankSampler
from deepspeed_sdp.errors import DataError

Batch = dict[str, torch.Tensor]


class Text(Protocol):
    """Text to train on.

    Attributes:
        tokenizer_folder: a HuggingFace tokenizer.
        unigram_val_loss: entropy baseline on the held-out tokens, nats per token.
        heldout: items ``{"input_ids": int64 [T], "labels": int64 [T], ...}``.
    """

    tokenizer_folder: Path
    unigram_val_loss: float
    heldout: Any

    def batches(self, rank: int, world_size: int, batch_size: int, start_sample: int) -> Iterator[Batch]:
        """Endless micro-batches ``[batch_size, T]`` of ``rank`` (``engine.data_rank``), from ``start_sample`` on."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the number of samples; collective."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on any number of ranks.

        Raises:
            DataError: it was taken of another text.
        """

    def skipped(self) -> dict[str, int]:
        """Rows and files that this rank left out so far, by reason."""

    def close(self) -> None:
        """End what runs beside the training."""


class PackedText:
    """Sequences that lie on disk; an epoch is a permutation of them."""

    def __init__(
        self,
        tokenizer_folder: Path,
        train: Any,
        heldout: Any,
        unigram_val_loss: float,
        seed: int,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """``identity``: what the order of samples follows from, besides the number of sequences and ``seed``."""
        self.tokenizer_folder = tokenizer_folder
        self.unigram_val_loss = unigram_val_loss
        self.heldout = heldout
        self._train = train
        self._seed = seed
        self._identity = {"sequences": len(train), "seed": seed, **(identity or {})}

    def batches(self, rank: int, world_size: int, batch_size: int, start_sample: int) -> Iterator[Batch]:
        """See :class:`Text`.

        Raises:
            DataError: there are fewer sequences than one global batch.
        """
        sampler = RankSampler(len(self._train), seed=self._seed)
        # Where the samples that were trained on end, on however many ranks.
        for indices in sampler.batches(rank, world_size, batch_size, start_sample):
            yield stack([self._train[int(i)] for i in indices])

    def state_dict(self) -> dict[str, Any]:
        """What text it is; where it is, the number of samples says."""
        return dict(self._identity)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Text`."""
        other = [key for key, value in self._identity.items() if state.get(key) != value]
        if state and other:
            key = other[0]
            raise DataError(
                f"text: the checkpoint was made with another {key} ({state.get(key, 'none')}), this is "
                f"{self._identity[key]}; takes the same text, sequence length and seed to go on, or --restart"
            )

    def skipped(self) -> dict[str, int]:
        """Nothing: what preparation left out, its manifest says."""
        return {}

    def close(self) -> None:
        """Nothing runs beside the training."""


def stack(items: Sequence[Batch]) -> Batch:
    """Items ``[T]`` as one batch ``[len(items), T]``."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def heldout_batches(text: Text, limit: int, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
    """This rank's share (every ``world_size``-th) of the first ``limit`` held-out sequences (0: all)."""
    count = min(limit or len(text.heldout), len(text.heldout))
    mine = range(rank, count, world_size)
    for start in range(0, len(mine), batch_size):
        yield stack([text.heldout[i] for i in mine[start : start + batch_size]])
