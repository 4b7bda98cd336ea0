"""Initialise a subnetwork that was cut on the meta device: only what a worker owns ever takes memory.

Every unit of every weight is drawn from a seed of its own, made of (seed, parameter name, unit), by the model family's
own ``_init_weights``. So all owners of a unit agree to the bit without talking, and the union of the subnetworks is one
and the same full model for every ``N``, ``K`` and plan.
"""

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters.base import features_of, is_linear
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.subnetwork.client_map import ClientMap
from deepspeed_sdp.subnetwork.layout import Fragment
from deepspeed_sdp.subnetwork.subnetwork import Subnetwork


def is_meta(model: nn.Module) -> bool:
    """Whether ``model`` was built on the meta device.

    Raises:
        ModelError: some parameters are on the meta device and some are not.
    """
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta and len(meta) < len(list(model.named_parameters())):
        raise ModelError(f"model: {meta[0]} is on the meta device and other parameters are not; takes all or none")
    return bool(meta)


@torch.no_grad()
def materialize(
    subnetwork: Subnetwork, device: torch.device | str, seed: int = 0, client: ClientMap | None = None
) -> None:
    """Give every meta parameter and buffer of ``subnetwork.module`` memory on ``device``, and its initial values.

    Args:
        client: learns which parameters take the place of those on the meta device.

    Raises:
        ModelError: the family's ``_init_weights`` leaves a parameter or buffer without a value.
    """
    model = subnetwork.module
    tied = _tied(model)
    owners = _owners(subnetwork)
    # What a family says of a whole branch, the adapter says of its parameters.
    drawn_in_parts = owners | {full.space for full in subnetwork.full.by_unit.values()}
    fresh: dict[int, nn.Parameter] = {}
    with torch.random.fork_rng(devices=[]):
        for module_name, module in model.named_modules():
            parameters = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) not in fresh]
            for local, parameter in parameters:
                is_view = _join(module_name, local) in subnetwork.views
                fresh[id(parameter)] = (_without_memory if is_view else _real)(module, local, parameter)
            parameters = [item for item in parameters if _join(module_name, item[0]) not in subnetwork.views]
            _realize_buffers(module)
            _init_parts_of_buffers(subnetwork, module_name, module, seed)
            if not any(_is_special(subnetwork, owners, _join(module_name, local)) for local, _ in parameters):
                if module_name not in drawn_in_parts:
                    with _seeded(seed, module_name):
                        _family_init(model, module)
                _move(module, device)
                continue
            for local, _ in parameters:
                fragment = subnetwork.fragments[_join(module_name, local)]
                if fragment.full_name not in subnetwork.full.by_unit:
                    _init_shared(subnetwork, fragment, module.get_parameter(local), seed)
                elif is_linear(subnetwork.full.skeleton.get_submodule(fragment.full_name.rpartition(".")[0])):
                    _init_units(subnetwork, fragment, module.get_parameter(local), seed)
                else:
                    _init_part(subnetwork, fragment, module.get_parameter(local), seed)
            _move(module, device)
    for names in tied:
        for name in names[1:]:
            _assign(model, name, model.get_parameter(names[0]))
    if client is not None:
        client.renew(fresh)
    subnetwork.link_views()
    _check_initialised(model)


def family_buffers(model: nn.Module, module: nn.Module) -> None:
    """Buffers of ``module`` on the meta device: memory on the CPU, and the family's values; NaN where it has none."""
    _realize_buffers(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _family_init(model, module)


def _owners(subnetwork: Subnetwork) -> set[str]:
    """Names of the full model's modules with tensors that fall into units."""
    return {name.rpartition(".")[0] for name in subnetwork.full.by_unit}


def _is_special(subnetwork: Subnetwork, owners: set[str], name: str) -> bool:
    """Whether a parameter is drawn on its own: it sits in a module that falls into units, or was moved by the cut."""
    full_name = subnetwork.fragments[name].full_name
    return full_name != name or full_name.rpartition(".")[0] in owners


def _init_units(subnetwork: Subnetwork, fragment: Fragment, value: torch.Tensor, seed: int) -> None:
    """Draw the units of a fragment of a linear layer one by one."""
    full = subnetwork.full.by_unit[fragment.full_name]
    width, dim = full.features_per_unit, full.unit_dim
    start = fragment.start if fragment.dim is not None else 0
    shape = list(full.unit_shape)
    shape[dim] = width
    is_bias = len(full.shape) == 1
    rows = width * full.groups
    out_features, in_features = (rows, 1) if is_bias else (shape[0], math.prod(shape[1:]))
    unit = nn.Linear(in_features, out_features, bias=is_bias, device="meta", dtype=value.dtype).to_empty(device="cpu")
    source = unit.bias if is_bias else unit.weight
    # Held whole, a parameter has its own shape.
    drawn = torch.empty(value.shape, dtype=value.dtype).view(
        full.unit_shape if value.shape == full.shape else value.shape
    )
    for i in range(drawn.shape[dim] // width):
        with _seeded(seed, fragment.full_name, start // width + i):
            _family_init(subnetwork.module, unit)
        drawn.narrow(dim, i * width, width).copy_(source.view(shape))
    scale = subnetwork.adapter.init_scale(subnetwork.module, fragment.full_name)
    value.copy_((drawn * scale if scale != 1.0 else drawn).view(value.shape))


def _init_part(subnetwork: Subnetwork, fragment: Fragment, value: torch.Tensor, seed: int) -> None:
    """A part of what its whole module is drawn with: the spread of a convolution goes by all of its outputs."""
    full = subnetwork.full.by_unit[fragment.full_name]
    owner_name, _, local = fragment.full_name.rpartition(".")
    drawn = _drawn(subnetwork, owner_name, seed, value.dtype).get_parameter(local).detach()
    value.copy_(drawn if fragment.dim is None else full.part_of(drawn, fragment))


def _init_parts_of_buffers(subnetwork: Subnetwork, name: str, module: nn.Module, seed: int) -> None:
    """Buffers of a module of which parts are owned, from those of the whole module."""
    names = {local: _join(name, local) for local, _ in module.named_buffers(recurse=False)}
    if not names or name not in _owners(subnetwork):
        return
    drawn = _drawn(subnetwork, name, seed, torch.float32)
    for local, full_name in names.items():
        whole = drawn.get_buffer(local)
        if full_name in subnetwork.buffers:
            full, fragments = subnetwork.buffers[full_name]
            whole = torch.cat([full.part_of(whole, fragment) for fragment in fragments], full.unit_dim)
        buffer = module.get_buffer(local)
        buffer.copy_(whole)


def _init_shared(subnetwork: Subnetwork, fragment: Fragment, value: torch.Tensor, seed: int) -> None:
    """Draw a shared parameter that sits in a module with partitioned ones: a bias, or a norm of an absent module."""
    owner_name, _, local = fragment.full_name.rpartition(".")
    owner = subnetwork.full.skeleton.get_submodule(owner_name)
    if is_linear(owner):
        owner = nn.Linear(1, features_of(owner)[1], bias=True, device="meta", dtype=value.dtype)
    owner = copy.deepcopy(owner).to_empty(device="cpu")
    with _seeded(seed, fragment.full_name):
        _family_init(subnetwork.module, owner)
    value.copy_(owner.get_parameter(local))


def _drawn(subnetwork: Subnetwork, name: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """The whole module ``name`` of the full model with its initial values, on the CPU."""
    module = copy.deepcopy(subnetwork.full.skeleton.get_submodule(name)).to(dtype).to_empty(device="cpu")
    with _seeded(seed, name):
        _family_init(subnetwork.module, module)
    return module


def _family_init(model: nn.Module, module: nn.Module) -> None:
    init: Any = getattr(model, "_init_weights", None)
    if init is not None:
        init(module)


@contextmanager
def _seeded(seed: int, *key: object) -> Iterator[None]:
    digest = hashlib.sha256("\0".join(map(str, (seed, *key))).encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    yield


def _real(module: nn.Module, local: str, parameter: nn.Parameter) -> nn.Parameter:
    # NaN, so that a value which no rule sets is found instead of trained. On the CPU, whose generator is the one that
    # is seeded and gives the same numbers beside any accelerator.
    value = torch.full(parameter.shape, math.nan, dtype=parameter.dtype, device="cpu")
    real = nn.Parameter(value, requires_grad=parameter.requires_grad)
    module.register_parameter(local, real)
    return real


def _without_memory(module: nn.Module, local: str, parameter: nn.Parameter) -> nn.Parameter:
    """Stands for a view until what it is a view of is there."""
    real = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
    module.register_parameter(local, real)
    return real


def _move(module: nn.Module, device: torch.device | str) -> None:
    """Own parameters and buffers of ``module`` to ``device``; parameters stay the same objects."""
    for parameter in module.parameters(recurse=False):
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for local, buffer in module.named_buffers(recurse=False):
        module._buffers[local] = buffer.to(device)


def _realize_buffers(module: nn.Module) -> None:
    for local, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            fill = math.nan if buffer.is_floating_point() else 0
            persistent = local not in module._non_persistent_buffers_set
            value = torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")
            module.register_buffer(local, value, persistent=persistent)


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, local = name.rpartition(".")
    setattr(model.get_submodule(parent), local, parameter)


def _is_initialised(value: torch.Tensor) -> bool:
    return not bool(torch.isnan(value).any())


def _check_initialised(model: nn.Module) -> None:
    for kind, values in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in values:
            if value.is_floating_point() and not _is_initialised(value):
                raise ModelError(
                    f"model: {type(model).__name__}._init_weights gives {kind} {name} no value, so the model cannot be "
                    "built on the meta device; give a model built in memory instead"
                )


def _join(module_name: str, local: str) -> str:
    return f"{module_name}.{local}" if module_name else local
