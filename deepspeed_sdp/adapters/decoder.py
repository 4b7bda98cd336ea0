"""What decoders of transformers have in common: a list of layers, each an attention and an MLP branch with input norms.

A family says where these are and how their linears fall into units; the rest is here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from deepspeed_sdp.adapters.base import (
    AbsentModule,
    Block,
    BlockUnit,
    PartitionedLinear,
    PartitionedModule,
    features_of,
    is_linear,
    linear_numel,
    matmul_flops,
)
from deepspeed_sdp.plan import UnitSpace


class AbsentAttention(AbsentModule):
    """Attention without a head, and no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
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


class DecoderAdapter(ABC):
    """Implements :class:`deepspeed_sdp.adapters.base.Adapter` for a family.

    Attributes:
        name, families, units: see there.
        layers_name: of the list of decoder layers in the model.
        branches: kind of unit -> names in a layer of the branch and of its input norm.
        linears: kind of unit -> names of the linears in the branch.
    """

    name: str
    families: tuple[str, ...]
    units: ClassVar[dict[str, str]] = {"attention": "a head", "mlp": "a neuron"}
    layers_name: str
    branches: ClassVar[dict[str, tuple[str, str]]]
    linears: ClassVar[dict[str, tuple[str, ...]]]

    @abstractmethod
    def attention(self, name: str, index: int, attention: nn.Module, seq_length: int) -> PartitionedModule:
        """How the heads of layer ``index`` are units; ``name`` is the module's."""

    @abstractmethod
    def mlp(self, name: str, index: int, mlp: nn.Module) -> PartitionedModule:
        """The same of its neurons."""

    def is_known_layer(self, layer: nn.Module) -> bool:
        """Whether a layer that has the names is computed as the family does, as far as names do not say it."""
        return True

    def init_scale(self, model: nn.Module, parameter: str) -> float:
        """What the family's initial values of one full parameter are multiplied by, where its modules do not say."""
        return 1.0

    def knows(self, model: nn.Module) -> bool:
        layers: Any = model
        for part in self.layers_name.split("."):
            layers = getattr(layers, part, None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return False
        return all(self._has_names(layer) and self.is_known_layer(layer) for layer in layers)

    def _has_names(self, layer: nn.Module) -> bool:
        return all(
            all(is_linear(getattr(getattr(layer, branch, None), linear, None)) for linear in self.linears[kind])
            and isinstance(getattr(layer, norm, None), nn.Module)
            for kind, (branch, norm) in self.branches.items()
        )

    def layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def partitioned_modules(
        self, model: nn.Module, kinds: Sequence[str], seq_length: int = 2048
    ) -> list[PartitionedModule]:
        modules = []
        for index, layer in enumerate(self.layers(model)):
            prefix = f"{self.layers_name}.{index}."
            if "attention" in kinds:
                name = self.branches["attention"][0]
                modules.append(self.attention(prefix + name, index, layer.get_submodule(name), seq_length))
            if "mlp" in kinds:
                name = self.branches["mlp"][0]
                modules.append(self.mlp(prefix + name, index, layer.get_submodule(name)))
        return modules

    def blocks(
        self, model: nn.Module, block_unit: BlockUnit, kinds: Sequence[str], seq_length: int = 2048
    ) -> list[Block]:
        units = self.partitioned_modules(model, ("attention", "mlp"), seq_length)
        flops = {(m.space.layer, m.space.kind): m.space.num_units * m.space.unit_flops for m in units}
        blocks = []
        for index, layer in enumerate(self.layers(model)):
            prefix = f"{self.layers_name}.{index}"
            if block_unit == "layer":
                both = flops[index, "attention"] + flops[index, "mlp"]
                blocks.append(Block(UnitSpace(prefix, "layer", index, 1, _numel(layer), both)))
                continue
            for kind, (name, norm) in self.branches.items():
                if kind in kinds:
                    numel = _numel(layer.get_submodule(name)) + _numel(layer.get_submodule(norm))
                    space = UnitSpace(f"{prefix}.{name}", kind, index, 1, numel, flops[index, kind])
                    blocks.append(Block(space, (f"{prefix}.{norm}",)))
        return blocks

    def absent(self, kind: str) -> type[AbsentModule]:
        return _ABSENT[kind]


def attention_of(
    name: str,
    index: int,
    units: int,
    module: nn.Module,
    linears: tuple[PartitionedLinear, ...],
    flops: float,
) -> PartitionedModule:
    """A module of ``units`` heads or KV groups; ``flops``: per token, beside those of its weights."""
    return _partitioned(name, "attention", index, units, module, linears, flops)


def mlp_of(name: str, index: int, module: nn.Module, linears: tuple[PartitionedLinear, ...]) -> PartitionedModule:
    """A module whose units are neurons: outputs of its first linear."""
    units = features_of(module.get_submodule(linears[0].name))[1]
    return _partitioned(name, "mlp", index, units, module, linears, 0.0)


def keeps_output(attention: nn.Module) -> bool:
    """Fused kernels compute their backward pass from the output; plain matrix products do not."""
    config: Any = getattr(attention, "config", None)
    return getattr(config, "_attn_implementation", "eager") in ("sdpa", "flash_attention_2", "flash_attention_3")


def _partitioned(
    name: str,
    kind: str,
    index: int,
    units: int,
    module: nn.Module,
    linears: tuple[PartitionedLinear, ...],
    more_flops: float,
) -> PartitionedModule:
    numel = sum(linear_numel(module.get_submodule(spec.name), spec) for spec in linears)
    space = UnitSpace(name, kind, index, units, numel, matmul_flops(numel) + more_flops)
    return PartitionedModule(space, linears)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
