"""The Llama family: MLP neurons and KV groups, by attribute names. Llama, Mistral, Qwen2, Qwen3 and their like.

A KV group is one KV head with the query heads that read it; a neuron is a row of ``gate_proj`` and ``up_proj`` with its
column of ``down_proj``. Norms, embeddings, the output head, and per-head norms (Qwen3's ``q_norm``) are shared.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters.base import (
    AbsentModule,
    Block,
    BlockUnit,
    PartitionedLinear,
    PartitionedModule,
    attention_flops,
    linear_numel,
    matmul_flops,
)
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.plan import UnitSpace

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MLP = ("gate_proj", "up_proj", "down_proj")


class AbsentAttention(AbsentModule):
    """Attention without a head, and no attention weights."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.residue(hidden_states), None


class AbsentMLP(AbsentModule):
    """An MLP without a neuron."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residue(x)


class AbsentLayer(AbsentModule):
    """A decoder layer that is not there: the identity on the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


_ABSENT: dict[str, type[AbsentModule]] = {"attention": AbsentAttention, "mlp": AbsentMLP, "layer": AbsentLayer}


class LlamaAdapter:
    """See the module. Implements :class:`deepspeed_sdp.adapters.base.Adapter`."""

    name = "llama"
    families = ("Llama", "Mistral", "Qwen2", "Qwen3")

    def knows(self, model: nn.Module) -> bool:
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return False
        return all(_has_llama_shape(layer) for layer in layers) and all(
            all(isinstance(getattr(getattr(layer, part, None), name, None), nn.Linear) for name in names)
            for layer in layers
            for part, names in (("self_attn", _ATTENTION), ("mlp", _MLP))
        )

    def partitioned_modules(
        self, model: nn.Module, kinds: Sequence[str], seq_length: int = 2048
    ) -> list[PartitionedModule]:
        modules = []
        for index, layer in enumerate(self.layers(model)):
            prefix = f"model.layers.{index}"
            if "attention" in kinds:
                attention = layer.get_submodule("self_attn")
                modules.append(_attention(f"{prefix}.self_attn", index, attention, seq_length))
            if "mlp" in kinds:
                modules.append(_mlp(f"{prefix}.mlp", index, layer.get_submodule("mlp")))
        return modules

    def blocks(
        self, model: nn.Module, block_unit: BlockUnit, kinds: Sequence[str], seq_length: int = 2048
    ) -> list[Block]:
        blocks = []
        for index, layer in enumerate(self.layers(model)):
            prefix = f"model.layers.{index}"
            flops = {
                "attention": _flops(_attention("", index, layer.get_submodule("self_attn"), seq_length)),
                "mlp": _flops(_mlp("", index, layer.get_submodule("mlp"))),
            }
            if block_unit == "layer":
                blocks.append(Block(UnitSpace(prefix, "layer", index, 1, _numel(layer), sum(flops.values()))))
                continue
            for kind, name, norm in (
                ("attention", "self_attn", "input_layernorm"),
                ("mlp", "mlp", "post_attention_layernorm"),
            ):
                if kind in kinds:
                    numel = _numel(layer.get_submodule(name)) + _numel(layer.get_submodule(norm))
                    space = UnitSpace(f"{prefix}.{name}", kind, index, 1, numel, flops[kind])
                    blocks.append(Block(space, (f"{prefix}.{norm}",)))
        return blocks

    def layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule("model.layers")
        assert isinstance(layers, nn.ModuleList)
        return layers

    def absent(self, kind: str) -> type[AbsentModule]:
        return _ABSENT[kind]


def _has_llama_shape(layer: nn.Module) -> bool:
    """Whether the layer is two pre-norm branches, each with one norm of its own, and heads are counted from weights.

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


def _attention(name: str, index: int, attention: nn.Module, seq_length: int) -> PartitionedModule:
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    kv_heads, kv_rest = divmod(_linear(attention, "k_proj").out_features, head_dim)
    queries, rest = divmod(_linear(attention, "q_proj").out_features, head_dim * max(kv_heads, 1))
    if kv_rest or rest or not kv_heads:
        raise ModelError(
            f"{name}: q_proj has {_linear(attention, 'q_proj').out_features} and k_proj "
            f"{_linear(attention, 'k_proj').out_features} outputs; takes whole KV groups of heads of size {head_dim}"
        )
    linears = (
        PartitionedLinear("q_proj", "out", queries * head_dim),
        PartitionedLinear("k_proj", "out", head_dim),
        PartitionedLinear("v_proj", "out", head_dim),
        PartitionedLinear("o_proj", "in", queries * head_dim, is_input_kept=_keeps_output(attention)),
    )
    return _module(
        name, "attention", index, kv_heads, attention, linears, attention_flops(queries, head_dim, seq_length)
    )


def _mlp(name: str, index: int, mlp: nn.Module) -> PartitionedModule:
    linears = (
        PartitionedLinear("gate_proj", "out", 1),
        PartitionedLinear("up_proj", "out", 1),
        PartitionedLinear("down_proj", "in", 1),
    )
    made = _module(name, "mlp", index, _linear(mlp, "gate_proj").out_features, mlp, linears)
    return replace(made, is_gated=_is_gated(mlp))


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


def _keeps_output(attention: nn.Module) -> bool:
    """Fused kernels compute their backward pass from the output; plain matrix products do not."""
    config: Any = getattr(attention, "config", None)
    return getattr(config, "_attn_implementation", "eager") in ("sdpa", "flash_attention_2", "flash_attention_3")


def _module(
    name: str,
    kind: str,
    index: int,
    units: int,
    module: nn.Module,
    linears: tuple[PartitionedLinear, ...],
    more_flops: float = 0.0,
) -> PartitionedModule:
    numel = sum(linear_numel(_linear(module, spec.name), spec) for spec in linears)
    space = UnitSpace(name, kind, index, units, numel, matmul_flops(numel) + more_flops)
    return PartitionedModule(space, linears)


def _flops(module: PartitionedModule) -> float:
    return module.space.num_units * module.space.unit_flops


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = getattr(module, name)
    assert isinstance(linear, nn.Linear)
    return linear
