"""What transformers have in common: a list of layers, each an attention and an MLP branch with input norms.

A family says where these are and how their weights fall into units; the rest is here.
"""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from deepspeed_sdp.adapters.base import (
    AbsentModule,
    Block,
    BlockUnit,
    Layer,
    PartitionedModule,
    PartitionedTensor,
    features_of,
    inputs_of,
    is_linear,
    matmul_flops,
    outputs_of,
)
from deepspeed_sdp.adapters.tasks import CausalLM, Task
from deepspeed_sdp.plan import UnitSpace

# Of a tiny model; see Adapter.tiny.
HEAD_DIM, LAYERS, VOCABULARY = 16, 2, 32


class AbsentAttention(AbsentModule):
    """Attention without a head, and no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return self.residue(hidden_states), None


class AbsentMLP(AbsentModule):
    """An MLP without a neuron."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residue(x)


class AbsentLayer(AbsentModule):
    """A layer that is not there: the identity on the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class TransformerAdapter(ABC):
    """Implements :class:`deepspeed_sdp.adapters.base.Adapter` for a family.

    Attributes:
        name, families, units, task: see there.
        branches: kind of unit -> names in a layer of the branch and of its input norm.
        linears: kind of unit -> names of the linears in the branch.
        absent_modules: kind of unit -> what stands in for a module without units.
    """

    name: str
    families: tuple[str, ...]
    units: ClassVar[dict[str, str]] = {"mlp": "a neuron", "attention": "a head"}
    task: Task = CausalLM()
    branches: ClassVar[dict[str, tuple[str, str]]]
    linears: ClassVar[dict[str, tuple[str, ...]]]
    absent_modules: ClassVar[dict[str, type[AbsentModule]]] = {
        "attention": AbsentAttention,
        "mlp": AbsentMLP,
        "layer": AbsentLayer,
    }

    @abstractmethod
    def found_layers(self, model: nn.Module) -> list[Layer]:
        """The layers, in forward order; none where the model has no such names."""

    @abstractmethod
    def attention(self, name: str, index: int, attention: nn.Module, length: int) -> PartitionedModule:
        """How the heads of layer ``index`` are units; ``name`` is the module's, ``length`` that of what is attended
        to."""

    @abstractmethod
    def mlp(self, name: str, index: int, mlp: nn.Module) -> PartitionedModule:
        """The same of its neurons."""

    @abstractmethod
    def geometry(self, model: nn.Module, layer: Layer, size: int | None) -> tuple[int, int]:
        """How many positions of a sample go through ``layer``, and to how many each attends; see
        :meth:`Adapter.partitioned_modules` for ``size``."""

    def is_known_layer(self, layer: nn.Module) -> bool:
        """Whether a layer that has the names is computed as the family does, as far as names do not say it."""
        return True

    def init_scale(self, model: nn.Module, parameter: str) -> float:
        """What the family's initial values of one full parameter are multiplied by, where its modules do not say."""
        return 1.0

    def knows(self, model: nn.Module) -> bool:
        layers = [layer.module for layer in self.found_layers(model)]
        return bool(layers) and all(self._has_names(layer) and self.is_known_layer(layer) for layer in layers)

    def _has_names(self, layer: nn.Module) -> bool:
        return all(
            all(is_linear(getattr(getattr(layer, branch, None), linear, None)) for linear in self.linears[kind])
            and isinstance(getattr(layer, norm, None), nn.Module)
            for kind, (branch, norm) in self.branches.items()
        )

    def layers(self, model: nn.Module) -> list[Layer]:
        return self.found_layers(model)

    def partitioned_modules(
        self, model: nn.Module, kinds: Sequence[str], size: int | None = None
    ) -> list[PartitionedModule]:
        modules = []
        for index, layer in enumerate(self.layers(model)):
            positions, length = self.geometry(model, layer, size)
            for kind, make in self._kinds(length).items():
                branch = self.branches[kind][0]
                if kind in kinds:
                    made = make(f"{layer.name}.{branch}", index, layer.module.get_submodule(branch))
                    modules.append(at_positions(made, positions))
        return modules

    def _kinds(self, length: int) -> dict[str, Callable[[str, int, nn.Module], PartitionedModule]]:
        return {"attention": lambda name, i, module: self.attention(name, i, module, length), "mlp": self.mlp}

    def blocks(
        self, model: nn.Module, block_unit: BlockUnit, kinds: Sequence[str], size: int | None = None
    ) -> list[Block]:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        inside = {(m.space.layer, m.space.kind): m for m in self.partitioned_modules(model, tuple(self.units), size)}
        blocks = []
        for index, layer in enumerate(self.layers(model)):
            modules = [inside[index, kind] for kind in self.branches]
            if block_unit == "layer":
                flops = sum(m.space.num_units * m.space.unit_flops for m in modules)
                space = UnitSpace(layer.name, "layer", index, 1, _numel(layer.module), flops)
                blocks.append(Block(space, (), _writes(modules, parameters), modules[0].positions))
                continue
            for module in modules:
                kind = module.space.kind
                branch, norm = self.branches[kind]
                if kind in kinds:
                    numel = sum(_numel(layer.module.get_submodule(name)) for name in (branch, norm))
                    flops = module.space.num_units * module.space.unit_flops
                    space = UnitSpace(f"{layer.name}.{branch}", kind, index, 1, numel, flops)
                    norms = (f"{layer.name}.{norm}",)
                    blocks.append(Block(space, norms, _writes([module], parameters), module.positions))
        return blocks

    def absent(self, kind: str, module: nn.Module) -> type[AbsentModule]:
        return self.absent_modules[kind]

    def tiny(self, config: Any) -> tuple[Any, int]:
        small = copy.deepcopy(config)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        queries, kv_heads = min(heads // kv_heads, 2), min(kv_heads, 4)
        small.num_attention_heads = queries * kv_heads
        small.hidden_size = small.num_attention_heads * HEAD_DIM
        if getattr(config, "num_key_value_heads", None):
            small.num_key_value_heads = kv_heads
        if getattr(config, "head_dim", None):
            small.head_dim = HEAD_DIM
        for width in ("intermediate_size", "n_inner"):
            if getattr(config, width, None):
                setattr(small, width, 3 * HEAD_DIM + 1)
        return self.with_layers(small, range(min(config.num_hidden_layers, LAYERS))), 7

    def with_layers(self, config: Any, kept: Sequence[int]) -> Any:
        fewer = copy.deepcopy(config)
        fewer.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            fewer.layer_types = [config.layer_types[layer] for layer in kept]
        return fewer


class DecoderAdapter(TransformerAdapter):
    """A causal language model.

    Attributes:
        layers_name: of the list of decoder layers in the model.
    """

    layers_name: str

    def found_layers(self, model: nn.Module) -> list[Layer]:
        return listed(model, self.layers_name)

    def geometry(self, model: nn.Module, layer: Layer, size: int | None) -> tuple[int, int]:
        return 1, 2048 if size is None else size

    def tiny(self, config: Any) -> tuple[Any, int]:
        small, size = super().tiny(config)
        small.vocab_size, small.pad_token_id = VOCABULARY, None
        return small, size


def listed(model: nn.Module, name: str) -> list[Layer]:
    """What lies in the list ``name`` of the model; nothing where there is none."""
    layers: Any = model
    for part in name.split("."):
        layers = getattr(layers, part, None)
    if not isinstance(layers, nn.ModuleList | nn.Sequential):
        return []
    return [Layer(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


def attention_of(
    name: str, index: int, units: int, module: nn.Module, tensors: tuple[PartitionedTensor, ...], flops: float
) -> PartitionedModule:
    """A module of ``units`` heads or KV groups; ``flops``: of one per position, beside those of its weights."""
    return _partitioned(name, "attention", index, units, module, tensors, flops)


def mlp_of(name: str, index: int, module: nn.Module, tensors: tuple[PartitionedTensor, ...]) -> PartitionedModule:
    """A module whose units are neurons: outputs of its first linear."""
    first = module.get_submodule(tensors[0].module.removeprefix(f"{name}."))
    return _partitioned(name, "mlp", index, features_of(first)[1], module, tensors, 0.0)


def neurons_of(name: str, mlp: nn.Module, *linears: str) -> tuple[PartitionedTensor, ...]:
    """A unit is an output of all ``linears`` of the module but the last, and an input of that."""
    *first, last = linears
    outputs = [outputs_of(f"{name}.{linear}", mlp.get_submodule(linear)) for linear in first]
    return (*itertools.chain(*outputs), *inputs_of(f"{name}.{last}", mlp.get_submodule(last)))


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
    tensors: tuple[PartitionedTensor, ...],
    more_flops: float,
) -> PartitionedModule:
    parameters = {f"{name}.{local}": p.numel() for local, p in module.named_parameters()}
    numel = sum(parameters.get(tensor.name, 0) for tensor in tensors) // units
    return PartitionedModule(UnitSpace(name, kind, index, units, numel, matmul_flops(numel) + more_flops), tensors)


def at_positions(module: PartitionedModule, positions: int) -> PartitionedModule:
    """``module``, whose FLOPs are those of one position, for samples of so many."""
    if positions == 1:
        return module
    space = replace(module.space, unit_flops=module.space.unit_flops * positions)
    return replace(module, space=space, positions=float(positions))


def _writes(modules: Sequence[PartitionedModule], parameters: set[str]) -> tuple[str, ...]:
    weights = [tensor for module in modules for tensor in module.tensors if tensor.is_write]
    names = [name for tensor in weights for name in (tensor.name, f"{tensor.module}.bias")]
    return tuple(name for name in names if name in parameters)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
