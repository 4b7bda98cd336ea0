"""What shards are made of."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepspeed_sdp.data.source import Source, SourceSpec
from deepspeed_sdp.data.tokenizer import tokenizer_hash
from deepspeed_sdp.errors import ConfigError


@dataclass(frozen=True)
class ShardOptions:
    """What shards are made of.

    Attributes:
        source: what to read.
        tokenizer: a local folder or a name on the hub.
        train_tokenizer: instead, the size of a vocabulary to learn from the first documents.
        max_tokens: of the train split; exactly so many are kept if the source has them.
        heldout_fraction: of the documents, picked by their hash; 0 holds nothing out.
        max_heldout_tokens: held-out documents past so many tokens are left out of both splits.
        shard_tokens: tokens per file. Does not change what is read from them.
        add_bos: put the beginning-of-sequence token before every document.
    """

    source: SourceSpec
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    max_tokens: int | None = None
    heldout_fraction: float = 0.005
    max_heldout_tokens: int | None = 10_000_000
    shard_tokens: int = 100_000_000
    add_bos: bool = False

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            got = "neither" if self.tokenizer is None else "both"
            raise ConfigError(f"--tokenizer, --train_tokenizer: got {got}; takes one of them")
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"--heldout_fraction: got {self.heldout_fraction}; takes 0 or more and less than 1")
        for key in ("max_tokens", "max_heldout_tokens", "shard_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"--{key}: got {value}; takes a number from 1 on")


def request_of(options: ShardOptions, source: Source, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Everything that decides over the content of the shards, as JSON."""
    return {
        "source": source.identity(),
        "tokenizer": {"train": options.train_tokenizer} if tokenizer is None else tokenizer_hash(tokenizer),
        "max_tokens": options.max_tokens,
        "heldout_fraction": options.heldout_fraction,
        "max_heldout_tokens": options.max_heldout_tokens,
        "shard_tokens": options.shard_tokens,
        "add_bos": options.add_bos,
    }
