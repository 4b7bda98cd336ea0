"""What an adapter says of a model, held against the model: an adapter is input like any other."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from deepspeed_sdp.adapters.base import (
    Adapter,
    Block,
    BlockUnit,
    PartitionedModule,
    PartitionedTensor,
    unit_numel,
)
from deepspeed_sdp.errors import ModelError, SDPError
from deepspeed_sdp.plan import UnitSpace

T = TypeVar("T")

_KNOWN = (nn.Linear, Conv1D, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
_FORWARDS = (nn.Linear.forward, Conv1D.forward, nn.Conv2d.forward, _BatchNorm.forward)


def check_claims(model: nn.Module, adapter: Adapter, kinds: Sequence[str], block_unit: BlockUnit | None) -> None:
    """Check all that names and shapes can tell; a pure function of the full model, real or meta, and the adapter.

    Layers share no weight, with each other or with the rest. Every parameter is in one unit space, or shared. Units are
    whole and fill their tensors, whose modules compute what torch's (or transformers' ``Conv1D``) do.

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
    model: nn.Module, adapter: Adapter, kinds: Sequence[str], block_unit: BlockUnit | None, size: int | None
) -> str:
    """Name of the adapter and a digest of what it says, for ranks to compare."""
    said = [repr(module) for module in adapter.partitioned_modules(model, kinds, size)]
    said += [repr(block) for block in (adapter.blocks(model, block_unit, kinds, size) if block_unit else ())]
    return f"{adapter.name}, {len(said)} modules (digest {hashlib.sha256(repr(said).encode()).hexdigest()[:8]})"


class _Claims:
    """One adapter, one model.

    Attributes:
        claimed: name of a parameter or buffer -> name of the space that it was found in.
        layers: names of the layers.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self.claimed: dict[str, str] = {}
        self.layers: list[str] = []
        self.tensors = {
            name: tensor
            for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
            for name, tensor in named
        }

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
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if not layers or any(modules.get(name) is not module for name, module in layers):
            raise self.fail(f"its layers are {[name for name, _ in layers]}; takes modules of the model, one or more")
        self.layers = [name for name, _ in layers]
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        inside = tuple(f"{name}." for name in self.layers)
        for same in names.values():
            if len(same) > 1 and any(name.startswith(inside) for name in same):
                raise self.fail(
                    f"{same[0]} and {same[1]} are one parameter; takes tied weights outside of layers alone"
                )
        for name, layer in layers:
            if not any(True for _ in layer.parameters()):
                raise self.fail(f"{name} has no parameters; takes layers that are trained")

    def check_spaces(self, spaces: Sequence[UnitSpace]) -> None:
        seen: set[str] = set()
        last = 0
        for space in spaces:
            layer = self.layers[space.layer] if space.layer < len(self.layers) else f"number {space.layer}"
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
        if not module.tensors:
            raise self.fail(f"{space.name} has no tensors; takes those that its units lie in")
        for tensor in module.tensors:
            self.check_tensor(space, tensor)
        self.check_numel(space, unit_numel(self.model, module))
        for attribute, width in module.widths:
            has = getattr(parent, attribute, None)
            if has != width * space.num_units:
                raise self.fail(
                    f"{space.name}.{attribute} is {has!r}; said to be {width} for each of {space.num_units} units"
                )

    def check_tensor(self, space: UnitSpace, tensor: PartitionedTensor) -> None:
        name = tensor.name
        module = self.submodule(tensor.module)
        if not f"{name}.".startswith(f"{self.layers[space.layer]}."):
            raise self.fail(f"{name} of {space.name} is outside of its layer")
        if not _is_plain(module):
            raise self.fail(
                f"{tensor.module} is {type(module).__name__}; takes torch.nn.Linear, Conv1D, Conv2d without groups or "
                "BatchNorm, and their forward pass"
            )
        if name not in self.tensors:
            raise self.fail(f"{tensor.module} ({type(module).__name__}) has no {tensor.local}; takes tensors of it")
        shape = tuple(self.tensors[name].shape)
        if not 0 <= tensor.dim < len(shape) or tensor.width < 1 or tensor.groups < 1:
            raise self.fail(f"{name}, of shape {shape}, is cut by {tensor}; takes whole numbers from 1 on")
        if tensor.is_write and tensor.groups > 1:
            raise self.fail(f"{name} has inputs in {tensor.groups} groups; takes groups of outputs alone")
        units = space.num_units * tensor.width * tensor.groups
        if shape[tensor.dim] != units:
            groups = f" in each of {tensor.groups} groups" if tensor.groups > 1 else ""
            raise self.fail(
                f"{name} has {shape[tensor.dim]} along dimension {tensor.dim}; said to be {tensor.width} for each of "
                f"{space.num_units} units{groups}, which is {units}"
            )
        self.claim(name, space.name)

    def check_block(self, block: Block) -> None:
        space, layer = block.space, f"{self.layers[block.space.layer]}."
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
        """The stand-in of an absent module has none, and evaluation and checkpoints take them from any rank."""
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


def _is_plain(module: nn.Module) -> bool:
    """Whether it is known what it computes of its tensors. A module of the model's own kind shows that when tried."""
    if isinstance(module, _KNOWN):
        return type(module).forward in _FORWARDS and getattr(module, "groups", 1) == 1
    return not type(module).__module__.startswith("torch.")
