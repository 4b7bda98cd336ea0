"""How long a run is, from counted FLOPs."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Length:
    """The length of a run against its dense baseline.

    Attributes:
        steps: optimizer steps.
        tokens_per_step: over all ranks.
        flops_per_token: training FLOPs per token, mean over the workers.
        dense_flops_per_token: of the dense model.
        dense_tokens: that the baseline is trained on.
    """

    steps: int
    tokens_per_step: int
    flops_per_token: float
    dense_flops_per_token: float
    dense_tokens: float

    @property
    def tokens(self) -> int:
        """Training tokens over all ranks."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Training FLOPs over all ranks."""
        return self.tokens * self.flops_per_token

    @property
    def dense_flops(self) -> float:
        """FLOPs of the baseline."""
        return self.dense_tokens * self.dense_flops_per_token


def make_length(
    dense_tokens: float,
    match: Literal["tokens", "flops"],
    tokens_per_step: int,
    flops_per_token: float,
    dense_flops_per_token: float,
) -> Length:
    """Steps that spend the baseline's tokens (``match="tokens"``) or its FLOPs (``"flops"``), to the nearest step."""
    tokens = dense_tokens * (dense_flops_per_token / flops_per_token if match == "flops" else 1.0)
    steps = max(1, round(tokens / tokens_per_step))
    return Length(steps, tokens_per_step, flops_per_token, dense_flops_per_token, dense_tokens)
