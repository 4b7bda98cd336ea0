"""The Llama family: MLP neurons and KV groups, by attribute names. Llama, Mistral, Qwen2, Qwen3, Gemma and their like.

A KV group is one KV head with the query heads that read it; a neuron is a row of ``gate_proj`` and ``up_proj`` with its
column of ``down_proj``. Norms, embeddings, the output head, and per-head norms (Qwen3's ``q_norm``) are shared.
"""

import inspect
import itertools
from dataclasses import replace
from typing import ClassVar

from torch import nn

from deepspeed_sdp.adapters.base import PartitionedModule, attention_flops, features_of, inputs_of, outputs_of
from deepspeed_sdp.adapters.transformer import DecoderAdapter, attention_of, keeps_output, mlp_of, neurons_of
from deepspeed_sdp.errors import ModelError

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MLP = ("gate_proj", "up_proj", "down_proj")


class LlamaAdapter(DecoderAdapter):
    """See the module."""

    name = "llama"
    families = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
    units: ClassVar = {"mlp": "a neuron (gate, up and down)", "attention": "a KV head with its query heads"}
    layers_name = "model.layers"
    branches: ClassVar = {"attention": ("self_attn", _NORMS[0]), "mlp": ("mlp", _NORMS[1])}
    linears: ClassVar = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": _MLP}

    def is_known_layer(self, layer: nn.Module) -> bool:
        """Whether the layer is two pre-norm branches, each with a norm of its own, and heads are counted from weights.

        Others carry the same names but norm a branch's output, run the branches side by side, or norm over all heads.
        """
        if {name for name, _ in layer.named_children()} != {"self_attn", "mlp", *_NORMS}:
            return False
        attention = layer.get_submodule("self_attn")
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        head_dim = getattr(attention, "head_dim", None)
        return not hasattr(attention, "num_heads") and all(
            tuple(parameter.shape) == (head_dim,)
            for norm in head_norms
            if norm is not None
            for parameter in norm.parameters()
        )

    def attention(self, name: str, index: int, attention: nn.Module, length: int) -> PartitionedModule:
        head_dim = int(attention.head_dim)  # type: ignore[arg-type]
        features = {linear: features_of(attention.get_submodule(linear))[1] for linear in ("q_proj", "k_proj")}
        kv_heads, kv_rest = divmod(features["k_proj"], head_dim)
        queries, rest = divmod(features["q_proj"], head_dim * max(kv_heads, 1))
        if kv_rest or rest or not kv_heads:
            raise ModelError(
                f"{name}: q_proj has {features['q_proj']} and k_proj {features['k_proj']} outputs; takes whole KV "
                f"groups of heads of size {head_dim}"
            )
        widths = {"q_proj": queries * head_dim, "k_proj": head_dim, "v_proj": head_dim}
        outputs = [outputs_of(f"{name}.{n}", attention.get_submodule(n), width) for n, width in widths.items()]
        output = attention.get_submodule("o_proj")
        kept = keeps_output(attention)
        inputs = inputs_of(f"{name}.o_proj", output, queries * head_dim, is_input_kept=kept)
        tensors = (*itertools.chain(*outputs), *inputs)
        return attention_of(name, index, kv_heads, attention, tensors, attention_flops(queries, head_dim, length))

    def mlp(self, name: str, index: int, mlp: nn.Module) -> PartitionedModule:
        return replace(mlp_of(name, index, mlp, neurons_of(name, mlp, *_MLP)), is_gated=_is_gated(mlp))


def _is_gated(mlp: nn.Module) -> bool:
    """By its source: the same names could stand for another formula."""
    if {name for name, _ in mlp.named_children()} != {*_MLP, "act_fn"}:
        return False
    if type(mlp.get_submodule("act_fn")).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    try:
        source = inspect.getsource(type(mlp).forward)
    except (OSError, TypeError):  # defined where no source is
        return False
    return "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))" in source
