"""What models are trained for: which inputs they take, and over what their loss is a mean."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

Batch = Mapping[str, torch.Tensor]

# Labels that count for nothing, as in torch's cross-entropy.
_IGNORED = -100


class Task(Protocol):
    """Of the models of an adapter."""

    @property
    def sample(self) -> str:
        """What the FLOPs are counted for: ``"token"`` or ``"image"``."""

    def has_targets(self, batch: Batch) -> torch.Tensor:
        """``[B]`` bool: the rows of a batch with something to predict."""

    def num_targets(self, batch: Batch) -> torch.Tensor:
        """Over how many predictions the loss of a batch is the mean; one integer, on the batch's device."""

    def size(self, seq_length: int) -> int | None:
        """Of a sample, as adapters take it, where the configuration says ``plan.seq_length``."""

    def example(self, config: Any, count: int, size: int, like: torch.Tensor) -> dict[str, Any]:
        """``count`` samples of ``size`` with labels, as the model takes them, on the device and in the dtype of
        ``like``."""


class CausalLM:
    """The next token: ``input_ids`` and ``labels`` ``[B, T]``; a sample's size is ``T``."""

    sample = "token"

    def has_targets(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"][:, 1:] != _IGNORED).any(1)

    def num_targets(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"][:, 1:] != _IGNORED).sum()

    def size(self, seq_length: int) -> int | None:
        return seq_length

    def example(self, config: Any, count: int, size: int, like: torch.Tensor) -> dict[str, Any]:
        ids = torch.randint(0, config.vocab_size, (count, size), device=like.device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}


class ImageClassification:
    """The class: ``pixel_values`` ``[B, channels, H, W]``, ``labels`` ``[B]``, or ``[B, classes]`` where they are
    mixed; a sample's size is ``H = W``."""

    sample = "image"

    def has_targets(self, batch: Batch) -> torch.Tensor:
        labels = batch["labels"]
        return labels != _IGNORED if labels.dim() == 1 else torch.ones_like(labels[:, 0], dtype=torch.bool)

    def num_targets(self, batch: Batch) -> torch.Tensor:
        return self.has_targets(batch).sum()

    def size(self, seq_length: int) -> int | None:
        return None

    def example(self, config: Any, count: int, size: int, like: torch.Tensor) -> dict[str, Any]:
        images = torch.randn(count, config.num_channels, size, size, device=like.device, dtype=like.dtype)
        return {"pixel_values": images, "labels": torch.randint(0, config.num_labels, (count,), device=like.device)}
