"""Adapters that say what is not so, and one of a family whose branches share a norm."""

from dataclasses import replace
from typing import ClassVar

import torch
from transformers import PhiConfig, PhiForCausalLM

from deepspeed_sdp import adapters
from deepspeed_sdp.adapters.base import AbsentModule, features_of, inputs_of, outputs_of
from deepspeed_sdp.adapters.gpt2 import GPT2Adapter
from deepspeed_sdp.adapters.gpt_neox import GPTNeoXAdapter
from deepspeed_sdp.adapters.llama import LlamaAdapter
from deepspeed_sdp.adapters.transformer import DecoderAdapter, attention_of, mlp_of, neurons_of


class PhiAdapter(DecoderAdapter):
    """True for neurons and layers: attention and MLP run side by side, after one norm."""

    name = "phi"
    families = ("Phi",)
    layers_name = "model.layers"
    branches: ClassVar = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "input_layernorm")}
    linears: ClassVar = {"attention": ("q_proj", "k_proj", "v_proj", "dense"), "mlp": ("fc1", "fc2")}

    def attention(self, name, index, attention, length):
        size, queries = attention.head_dim, attention.num_key_value_groups
        tensors = (
            *outputs_of(f"{name}.q_proj", attention.q_proj, queries * size),
            *outputs_of(f"{name}.k_proj", attention.k_proj, size),
            *outputs_of(f"{name}.v_proj", attention.v_proj, size),
            *inputs_of(f"{name}.dense", attention.dense, queries * size),
        )
        return attention_of(name, index, features_of(attention.k_proj)[1] // size, attention, tensors, 0.0)

    def mlp(self, name, index, mlp):
        return mlp_of(name, index, mlp, neurons_of(name, mlp, "fc1", "fc2"))


class OneNorm(PhiAdapter):
    """Leaves the norm that both branches read to the attention branch."""

    def blocks(self, model, *args):
        return [self._without_norm(model, block) for block in super().blocks(model, *args)]

    def _without_norm(self, model, block):
        if block.space.kind != "mlp":
            return block
        norm = sum(parameter.numel() for parameter in model.get_submodule(block.norms[0]).parameters())
        return replace(block, norms=(), space=replace(block.space, unit_numel=block.space.unit_numel - norm))


class ChangedMLP(LlamaAdapter):
    """``change``: from what the true adapter says of an MLP to something else."""

    def __init__(self, change):
        self.change = change

    def mlp(self, name, index, mlp):
        return self.change(super().mlp(name, index, mlp))


class ChangedBlocks(LlamaAdapter):
    """The same of its blocks."""

    def __init__(self, change):
        self.change = change

    def blocks(self, *args, **kwargs):
        return self.change(super().blocks(*args, **kwargs))


class TupleMLP(AbsentModule):
    def forward(self, x):
        return (self.residue(x),)


class WrongStandIn(LlamaAdapter):
    def absent(self, kind, module):
        return TupleMLP if kind == "mlp" else super().absent(kind, module)


class ScaledStandIn(LlamaAdapter):
    """Where a layer is absent, it doubles the residual stream."""

    def absent(self, kind, module):
        return type("Doubled", (AbsentModule,), {"forward": lambda self, x, *_, **__: 2 * x})


class HeadsInThirds(GPTNeoXAdapter):
    """Says of GPT-NeoX what is true of GPT-2."""

    def attention(self, *args):
        made = super().attention(*args)
        fused = [
            replace(tensor, width=tensor.width // 3, groups=3) if "query_key_value" in tensor.name else tensor
            for tensor in made.tensors
        ]
        return replace(made, tensors=tuple(fused))


class NoWidths(GPT2Adapter):
    def attention(self, *args):
        return replace(super().attention(*args), widths=())


def tensor(number, **changes):
    """A change of one of a module's tensors."""

    def change(module):
        tensors = list(module.tensors)
        tensors[number] = replace(tensors[number], **changes)
        return replace(module, tensors=tuple(tensors))

    return change


def without_tensor(number):
    def change(module):
        left = tuple(tensor for i, tensor in enumerate(module.tensors) if i != number)
        return replace(module, tensors=left, space=replace(module.space, unit_numel=module.space.unit_numel * 2 // 3))

    return change


def space(**changes):
    """A change of a unit space."""
    return lambda module: replace(module, space=replace(module.space, **changes))


def phi_model(seed=0):
    torch.manual_seed(seed)
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=None,
        )
    )


def use(adapter):
    """Let ``find_adapter`` find it first; a function that takes this back."""
    before = adapters.ADAPTERS
    adapters.ADAPTERS = (adapter, *before)

    def restore():
        adapters.ADAPTERS = before

    return restore
