"""A LLaMA of transformers, run for all workers at once: their micro-batches are one batch.

``N`` workers, ``B`` sequences of each, ``T`` tokens, ``M = B T``, ``D`` hidden, ``H`` heads of size ``E``.
It computes with the model's own parameters, and only with those of a worker's subnetwork, so its time follows the
subnetworks' FLOPs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.ownership import Ownership
from benchmarks.quality.parts import Part, Whole

WHOLE = Whole()
Weights = Mapping[str, Tensor]


class SimulatedLlama:
    """Losses of ``model`` (``LlamaForCausalLM`` without biases) under some ownership."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model: nn.Module = model
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        if any(name.endswith("bias") for name in self.weights):
            raise ValueError("model: got one with biases; takes a LLaMA without")
        self.frozen = {name: parameter.detach() for name, parameter in self.weights.items()}
        self.num_layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._rotary = model.model.rotary_emb
        self._cos_sin: dict[int, tuple[Tensor, Tensor]] = {}

    def losses(self, ids_NBT: Tensor, ownership: Ownership, dropout: float = 0.0) -> Tensor:
        """``[N]``: the mean next-token loss of every worker on its own sequences, nats.

        Args:
            ids_NBT: token ids.
            ownership: of ``N`` workers.
            dropout: probability with which elements of what a branch adds are zero.
        """
        num_workers, _, length = ids_NBT.shape
        x_NMD = F.embedding(ids_NBT.flatten(1), self.weights["model.embed_tokens.weight"])
        for layer in range(self.num_layers):
            x_NMD = self._layer(x_NMD, f"model.layers.{layer}", length, ownership, dropout)
        x_NMD = self._norm(x_NMD, self.weights["model.norm.weight"])
        x_NBTD = x_NMD.view(*ids_NBT.shape, -1)[:, :, :-1]
        logits = F.linear(x_NBTD.flatten(0, 2), self.weights[self.head])
        losses = F.cross_entropy(logits, ids_NBT[:, :, 1:].flatten(), reduction="none")
        return losses.view(num_workers, -1).mean(1)

    def _layer(self, x_NMD: Tensor, name: str, length: int, ownership: Ownership, dropout: float) -> Tensor:
        def branch(kind: str, norm: str, run: Callable[..., Tensor], x: Tensor, weights: Weights) -> Tensor:
            def added(x: Tensor, weights: Weights) -> Tensor:
                part = ownership.parts.get(f"{name}.{kind}", WHOLE)
                normed = part.enter(self._norm(x, weights[f"{name}.{norm}.weight"]))
                out = part.leave(run(normed, f"{name}.{kind}", part, length, weights))
                return F.dropout(out, dropout) if dropout else out

            return self._add(x, f"{name}.{kind}", ownership, added, weights)

        def layer(x: Tensor, weights: Weights) -> Tensor:
            x = branch("self_attn", "input_layernorm", self._attention, x, weights)
            return branch("mlp", "post_attention_layernorm", self._mlp, x, weights)

        if name not in ownership.blocks:
            return layer(x_NMD, self.weights)
        return self._add(x_NMD, name, ownership, lambda x, weights: layer(x, weights) - x, self.weights)

    def _add(
        self, x: Tensor, name: str, ownership: Ownership, added: Callable[[Tensor, Weights], Tensor], weights: Weights
    ) -> Tensor:
        """``x`` and what a block adds, for those who have it."""
        block = ownership.blocks.get(name)
        if block is None or (block.scale == 1.0 and len(block.owners) == ownership.num_workers):
            return x + added(x, weights)
        if not block.owners:
            return x
        owners = torch.tensor(block.owners)
        mine = added(x.index_select(0, owners), weights)
        if not block.frozen:
            return x.index_add(0, owners, mine, alpha=block.scale)
        others = torch.tensor([w for w in range(ownership.num_workers) if w not in block.owners])
        order = torch.cat([owners, others]).argsort()
        theirs = added(x.index_select(0, others), self.frozen)
        return x + torch.cat([mine, theirs]).index_select(0, order)

    def _mlp(self, x: Tensor, name: str, part: Part, length: int, weights: Weights) -> Tensor:
        gate = part.read(x, weights[f"{name}.gate_proj.weight"], 1)
        up = part.read(x, weights[f"{name}.up_proj.weight"], 1)
        hidden = part.only_owned(F.silu(gate) * up, 1)
        return part.write(hidden, weights[f"{name}.down_proj.weight"], 1)

    def _attention(self, x: Tensor, name: str, part: Part, length: int, weights: Weights) -> Tensor:
        wide, narrow = self.group * self.head_dim, self.head_dim
        q, k, v = (
            part.read(x, weights[f"{name}.{linear}.weight"], width)
            for linear, width in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow))
        )
        shape = q.shape
        q, k, v = (y.reshape(-1, length, y.shape[-1] // narrow, narrow).transpose(1, 2) for y in (q, k, v))
        cos, sin = self._rope(length)
        q, k = q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.group > 1)
        hidden = part.only_owned(out.transpose(1, 2).reshape(shape), wide)
        return part.write(hidden, weights[f"{name}.o_proj.weight"], wide)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self._cos_sin:
            cos, sin = self._rotary(torch.zeros(1), torch.arange(length)[None])
            self._cos_sin[length] = (cos[0], sin[0])
        return self._cos_sin[length]


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
