"""The model and the tokens of a measurement: the same for every contender."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Workload:
    """A LLaMA and the batch of one step.

    Attributes:
        hidden_size, layers, head_size, vocab_size: of the model; the MLP has 11/4 of the hidden size.
        sequence: tokens of a sequence.
        micro_batch: sequences of a step and rank.
        precision: ``"fp32"``, or ``"bf16"``: computed in bf16 with fp32 master weights and optimizer state.
        device: where the full model is made; large ones are made far sooner on an accelerator.
    """

    hidden_size: int = 256
    layers: int = 8
    head_size: int = 32
    vocab_size: int = 2048
    sequence: int = 128
    micro_batch: int = 2
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of one rank's step."""
        return self.sequence * self.micro_batch

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight, a gradient and an activation as they are computed with."""
        return 4 if self.precision == "fp32" else 2

    def config(self) -> LlamaConfig:
        """Of the full model."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden_size // self.head_size,
            num_key_value_heads=self.hidden_size // self.head_size,
            max_position_embeddings=max(2048, self.sequence),
            use_cache=False,
        )

    def model(self) -> LlamaForCausalLM:
        """The full model in fp32, with the same weights on all ranks, in every call."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return LlamaForCausalLM(self.config())

    def batch(self, rank: int, step: int) -> torch.Tensor:
        """Tokens ``[micro_batch, sequence]`` of a rank in a step, int64 on the CPU."""
        generator = torch.Generator().manual_seed(10_007 * step + rank)
        return torch.randint(0, self.vocab_size, (self.micro_batch, self.sequence), generator=generator)
