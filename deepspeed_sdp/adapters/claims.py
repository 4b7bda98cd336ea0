"""What an adapter says of a model, held against the model: an adapter is input like any other."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from deepspeed_sdp.adapters.base import (
    Adapter,
    Block,
    BlockUnit,
    PartitionedLinear,
    PartitionedModule,
    features_of,
    is_linear,
    linear_numel,
)
from deepspeed_sdp.errors import ModelError, SDPError
from deepspeed_sdp.plan import UnitSpace

T = TypeVar("T")


def check_claims(model: nn.Module, adapter: Adapter, kinds: Sequence[str], block_unit: BlockUnit | None) -> None:
    """Check all that names and shapes can tell; a pure function of the full model, real or meta, and the adapter.

    Layers share no weight, with each other or with the rest. Every parameter is in one unit space, or shared. Units are
    whole and fill their linears, which compute what ``nn.Linear`` (or ``Conv1D``) does.

    Args:
        kinds: of the units that are partitioned.
        block_unit: what a unit is at block granularity; ``None`` at neuron granularity.

    Raises:
        ModelError: names the adapter, and what it says that is not so.
    """
    claims = _Claims(model, adapter)
    claims.check_layers()
    modules = claims.asked(lambda: adapter.partitioned_modules(model, kinds))
    blocks = claims.asked(lambda: adapter.blocks(model, block_unit, kinds)) if block_unit else []
    claims.check_spaces([module.space for module in modules])
    claims.check_spaces([block.space for block in blocks])
    for module in modules:
        claims.check_module(module)
    claims.claimed.clear()
    for block in blocks:
        claims.check_block(block)


def claims_digest(
    model: nn.Module, adapter: Adapter, kinds: Sequence[str], block_unit: BlockUnit | None, seq_length: int
) -> str:
    """Name of the adapter and a digest of what it says, for ranks to compare."""
    said = [repr(module) for module in adapter.partitioned_modules(model, kinds, seq_length)]
    said += [repr(block) for block in (adapter.blocks(model, block_unit, kinds, seq_length) if block_unit else ())]
    return f"{adapter.name}, {len(said)} modules (digest {hashlib.sha256(repr(said).encode()).hexdigest()[:8]})"


class _Claims:
    """One adapter, one model.

    Attributes:
        claimed: name of a parameter -> name of the space that it was found in.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self.claimed: dict[str, str] = {}
        self.layers_name = ""

    def fail(self, message: str) -> ModelError:
        return ModelError(f"model: adapter {self.adapter.name!r} on {type(self.model).__name__}: {message}")

    def asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except SDPError:
            raise
        except Exception as error:
            raise self.fail(f"{type(error).__name__}: {error}") from error

    def check_layers(self) -> None:
        layers = self.asked(lambda: self.adapter.layers(self.model))
        found = [name for name, module in self.model.named_modules() if module is layers and name]
        if not found or not isinstance(layers, nn.ModuleList) or not len(layers):
            raise self.fail(
                f"its layers are {type(layers).__name__}; takes a torch.nn.ModuleList of the model, not empty"
            )
        self.layers_name = found[0]
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        inside = f"{self.layers_name}."
        for same in names.values():
            if len(same) > 1 and any(name.startswith(inside) for name in same):
                raise self.fail(
                    f"{same[0]} and {same[1]} are one parameter; takes tied weights outside of layers alone"
                )
        for index, layer in enumerate(layers):
            if not any(True for _ in layer.parameters()):
                raise self.fail(f"{inside}{index} has no parameters; takes layers that are trained")

    def check_spaces(self, spaces: Sequence[UnitSpace]) -> None:
        seen: set[str] = set()
        last = 0
        for space in spaces:
            layer = f"{self.layers_name}.{space.layer}"
            if not f"{space.name}.".startswith(f"{layer}."):
                raise self.fail(f"{space.name} is said to be of layer {space.layer}; takes modules of {layer}")
            if space.layer < last:
                raise self.fail(f"{space.name} comes after layer {last}; takes modules in the order of layers")
            if space.name in seen:
                raise self.fail(f"{space.name} is listed twice; takes every module once")
            seen.add(space.name)
            last = space.layer

    def check_module(self, module: PartitionedModule) -> None:
        space = module.space
        parent = self.submodule(space.name)
        self.check_buffers(space)
        if not module.linears:
            raise self.fail(f"{space.name} has no linears; takes those that its units lie in")
        for spec in module.linears:
            self.check_linear(space, spec)
        numel = sum(linear_numel(parent.get_submodule(spec.name), spec) for spec in module.linears)
        self.check_numel(space, numel)
        for attribute, width in module.widths:
            has = getattr(parent, attribute, None)
            if has != width * space.num_units:
                raise self.fail(
                    f"{space.name}.{attribute} is {has!r}; said to be {width} for each of {space.num_units} units"
                )

    def check_linear(self, space: UnitSpace, spec: PartitionedLinear) -> None:
        name = f"{space.name}.{spec.name}"
        linear = self.submodule(name)
        is_plain = is_linear(linear) and type(linear).forward in (nn.Linear.forward, Conv1D.forward)
        if not is_plain or "weight" not in dict(linear.named_parameters(recurse=False)):
            raise self.fail(
                f"{name} is {type(linear).__name__}; takes torch.nn.Linear or Conv1D, and their forward pass"
            )
        if spec.cut not in ("out", "in") or spec.features_per_unit < 1 or spec.groups < 1:
            raise self.fail(f'{name} is cut by {spec}; takes "out" or "in", and whole numbers from 1 on')
        if spec.cut == "in" and spec.groups > 1:
            raise self.fail(f"{name} has inputs in {spec.groups} groups; takes groups of outputs alone")
        features = features_of(linear)[spec.cut == "out"]
        units = space.num_units * spec.features_per_unit * spec.groups
        if features != units:
            groups = f" in each of {spec.groups} groups" if spec.groups > 1 else ""
            raise self.fail(
                f"{name} has {features} {spec.cut}puts; said to be {spec.features_per_unit} for each of "
                f"{space.num_units} units{groups}, which is {units}"
            )
        self.claim(f"{name}.weight", space.name)
        if linear.bias is not None and spec.cut == "out":
            self.claim(f"{name}.bias", space.name)

    def check_block(self, block: Block) -> None:
        space, layer = block.space, f"{self.layers_name}.{block.space.layer}."
        if space.num_units != 1:
            raise self.fail(f"the block {space.name} is {space.num_units} units; takes 1")
        self.check_buffers(space)
        numel = 0
        for name in (space.name, *block.norms):
            if not f"{name}.".startswith(layer):
                raise self.fail(f"{name} of the block {space.name} is outside of its layer")
            for local, parameter in self.submodule(name).named_parameters():
                if not parameter.dim():
                    raise self.fail(f"{name}.{local} of the block {space.name} is a scalar; takes tensors")
                self.claim(f"{name}.{local}", space.name)
                numel += parameter.numel()
        self.check_numel(space, numel)

    def check_buffers(self, space: UnitSpace) -> None:
        """The stand-in of an absent module has none, and evaluation takes them from any rank."""
        for name, _ in self.submodule(space.name).named_buffers():
            raise self.fail(f"{space.name}.{name} is a buffer; takes buffers outside of what falls into units")

    def check_numel(self, space: UnitSpace, numel: int) -> None:
        if space.unit_numel != numel:
            raise self.fail(f"a unit of {space.name} is said to be {space.unit_numel} parameters, and has {numel}")

    def claim(self, parameter: str, space: str) -> None:
        other = self.claimed.get(parameter)
        if other == space:
            raise self.fail(f"{parameter} is in {space} twice; takes every parameter in one place")
        if other is not None:
            raise self.fail(
                f"{parameter} is in {other} and in {space}; takes every parameter in one place, and branches with "
                'norms of their own. Where branches share one, take granularity "neuron" or "layer"'
            )
        self.claimed[parameter] = space

    def submodule(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise self.fail(f"there is no module {name}") from None
