"""One worker's subnetwork: the full model with every module cut down to the units that the worker owns.

The model is cut in place, as ``fully_shard`` shards in place: the modules stay transformers' own, only smaller.
"""

import copy
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from deepspeed_sdp.adapters import Adapter, PartitionedLinear, PartitionedModule, find_adapter
from deepspeed_sdp.errors import ConfigError, ModelError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork.layout import SHARED, Fragment, FullParameter
from deepspeed_sdp.subnetwork.linear import SubnetworkLinear

OutputScaling = Literal["none", "inverse_sqrt_coverage", "inverse_coverage"]


@dataclass
class Subnetwork:
    """What the engine needs to know about a cut model.

    Attributes:
        module: the cut model, the very object that was given.
        plan: who owns what.
        index: ``w``, the worker whose subnetwork this is.
        adapter: the model family.
        fragments: for every parameter name of ``module``, where it lies in the full model.
        partitioned: for every full parameter that is partitioned, its full shape and cut.
        by_unit: the same for every full parameter that could be; initial values are drawn by these units, so that they
            do not depend on what is partitioned.
        full_order: names of all full parameters, in forward order.
        full_config: configuration of the full model.
        model_class: class of the full model.
        replaced: full parameter (by ``id``) -> the parameters that took its place.
    """

    module: nn.Module
    plan: SubnetworkPlan
    index: int
    adapter: Adapter
    fragments: dict[str, Fragment] = field(default_factory=dict)
    partitioned: dict[str, FullParameter] = field(default_factory=dict)
    by_unit: dict[str, FullParameter] = field(default_factory=dict)
    full_order: tuple[str, ...] = ()
    full_config: Any = None
    model_class: type[nn.Module] = nn.Module
    replaced: dict[int, list[nn.Parameter]] = field(default_factory=dict)

    @property
    def owned_numel(self) -> int:
        """Parameters that this worker holds, shared ones included."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def owner_set(self, name: str) -> int:
        """Index of the owner set of parameter ``name`` of :attr:`module`."""
        return self.fragments[name].owner_set

    def positions(self) -> dict[str, tuple[int, int]]:
        """For every parameter name of :attr:`module`: (place of the full parameter in forward order, start in it).

        Equal on all ranks for the same fragment, and so the base of every order that ranks must share.
        """
        places = {name: i for i, name in enumerate(self.full_order)}
        return {name: (places[fragment.full_name], fragment.start) for name, fragment in self.fragments.items()}

    def full_skeleton(self) -> nn.Module:
        """The full model on the meta device: shapes and names, no memory."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.full_config))


def partitioned_modules(
    model: nn.Module, adapter: Adapter, kinds: Sequence[str], shared_modules: Sequence[str] = ()
) -> list[PartitionedModule]:
    """The modules of ``model`` that are partitioned: those of ``kinds`` that no pattern of ``shared_modules`` names.

    A pattern (``fnmatch``) shares a module and everything in it, e.g. ``"model.layers.0"`` or ``"*.self_attn"``.

    Raises:
        ConfigError: a pattern matches no module, or nothing is left to partition.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in shared_modules:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"subnetwork_data_parallel.shared_modules: got {pattern!r}, which matches no module of "
                f"{type(model).__name__}; takes name patterns such as {names[-1]!r}"
            )

    def is_shared(name: str) -> bool:
        parts = name.split(".")
        ancestors = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(fnmatch.fnmatchcase(ancestor, pattern) for ancestor in ancestors for pattern in shared_modules)

    left = [module for module in adapter.partitioned_modules(model, kinds) if not is_shared(module.space.name)]
    if not left:
        raise ConfigError("subnetwork_data_parallel.shared_modules: shares every module; takes fewer patterns")
    return left


def cut_model(
    model: nn.Module,
    plan: SubnetworkPlan,
    index: int,
    *,
    output_scaling: OutputScaling = "none",
    adapter: Adapter | None = None,
) -> Subnetwork:
    """Cut ``model`` in place down to the subnetwork of worker ``index``; works on real and on meta parameters.

    Raises:
        ModelError: no adapter knows the model, or the plan was made for other shapes.
    """
    adapter = adapter or find_adapter(model)
    subnetwork = Subnetwork(
        model,
        plan,
        index,
        adapter,
        full_order=tuple(name for name, _ in model.named_parameters()),
        full_config=copy.deepcopy(getattr(model, "config", None)),
        model_class=type(model),
    )
    modules = {module.space.name: module for module in adapter.partitioned_modules(model, ("mlp", "attention"))}
    for module in modules.values():
        for spec in module.linears:
            subnetwork.by_unit.update(_full_parameters(model, module, spec))
    scale = _scale(output_scaling, plan)
    for planned in plan.spaces:
        found = modules.get(planned.space.name)
        if found is None or found.space.num_units != planned.space.num_units:
            got = f"{found.space.num_units} units" if found else "no such module"
            raise ModelError(
                f"plan: made for {planned.space.name} with {planned.space.num_units} units; the model has {got}"
            )
        _cut_module(subnetwork, found, scale)
    for name, _ in model.named_parameters():
        subnetwork.fragments.setdefault(name, Fragment(name, SHARED))
    config: Any = getattr(model, "config", None)
    if config is not None:
        # A cache of keys and values serves generation; a subnetwork only trains.
        config.use_cache = False
    return subnetwork


def _scale(output_scaling: OutputScaling, plan: SubnetworkPlan) -> float:
    powers = {"none": 0.0, "inverse_sqrt_coverage": 0.5, "inverse_coverage": 1.0}
    return math.pow(plan.coverage, -powers[output_scaling])


def _cut_module(subnetwork: Subnetwork, spec: PartitionedModule, scale: float) -> None:
    name = spec.space.name
    module = subnetwork.module.get_submodule(name)
    owned = subnetwork.plan.owned(name, subnetwork.index)
    for linear_spec in spec.linears:
        full_name = f"{name}.{linear_spec.name}"
        linear = module.get_submodule(linear_spec.name)
        assert isinstance(linear, nn.Linear)
        full = {kind: subnetwork.by_unit.get(f"{full_name}.{kind}") for kind in ("weight", "bias")}
        subnetwork.partitioned.update({parameter.name: parameter for parameter in full.values() if parameter})
        if not owned:
            continue
        pieces = {
            kind: [parameter.fragment(c.start, c.stop, c.owner_set) for c in owned]
            for kind, parameter in full.items()
            if parameter
        }
        _replace_linear(subnetwork, full_name, linear, linear_spec, pieces, scale)
    if not owned:
        _replace_by_absent(subnetwork, spec, module)


def _replace_by_absent(subnetwork: Subnetwork, spec: PartitionedModule, module: nn.Module) -> None:
    name = spec.space.name
    partitioned = {name for name in subnetwork.partitioned if name.startswith(f"{spec.space.name}.")}
    bias: nn.Parameter | None = None
    unused: list[nn.Parameter] = []
    for local, parameter in module.named_parameters():
        if f"{name}.{local}" in partitioned:
            subnetwork.replaced.setdefault(id(parameter), [])
        elif bias is None and any(local == f"{linear.name}.bias" for linear in spec.linears):
            bias = parameter
            subnetwork.fragments[f"{name}.bias"] = Fragment(f"{name}.{local}", SHARED)
        else:
            subnetwork.fragments[f"{name}.unused.{len(unused)}"] = Fragment(f"{name}.{local}", SHARED)
            unused.append(parameter)
    _replace(subnetwork.module, name, subnetwork.adapter.absent(spec.space.kind)(bias, unused))


def _full_parameters(model: nn.Module, module: PartitionedModule, spec: PartitionedLinear) -> dict[str, FullParameter]:
    name = f"{module.space.name}.{spec.name}"
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    width, space = spec.features_per_unit, module.space.name
    dim = 0 if spec.cut == "out" else 1
    parameters = [FullParameter(f"{name}.weight", tuple(linear.weight.shape), dim, width, space)]
    if linear.bias is not None and spec.cut == "out":
        parameters.append(FullParameter(f"{name}.bias", tuple(linear.bias.shape), 0, width, space))
    return {parameter.name: parameter for parameter in parameters}


def _replace_linear(
    subnetwork: Subnetwork,
    full_name: str,
    linear: nn.Linear,
    spec: PartitionedLinear,
    pieces: dict[str, list[Fragment]],
    scale: float,
) -> None:
    fragments = subnetwork.fragments
    weights = [_slice(subnetwork, linear.weight, fragment) for fragment in pieces["weight"]]
    biases = [_slice(subnetwork, linear.bias, fragment) for fragment in pieces.get("bias", [])]
    if len(weights) == 1 and (spec.cut == "out" or scale == 1.0):
        linear.weight = weights[0]
        fragments[f"{full_name}.weight"] = pieces["weight"][0]
        if biases:
            linear.bias = biases[0]
            fragments[f"{full_name}.bias"] = pieces["bias"][0]
        linear.out_features, linear.in_features = linear.weight.shape
        return
    if spec.cut == "in" and linear.bias is not None:
        biases = [linear.bias]
        fragments[f"{full_name}.biases.0"] = Fragment(f"{full_name}.bias", SHARED)
    for kind in pieces:
        plural = "weights" if kind == "weight" else "biases"
        for i, fragment in enumerate(pieces[kind]):
            fragments[f"{full_name}.{plural}.{i}"] = fragment
    replacement = SubnetworkLinear(weights, biases, spec.cut, scale if spec.cut == "in" else 1.0)
    _replace(subnetwork.module, full_name, replacement)


def _slice(subnetwork: Subnetwork, parameter: torch.Tensor, fragment: Fragment) -> nn.Parameter:
    assert fragment.dim is not None
    view = parameter.detach().narrow(fragment.dim, fragment.start, fragment.stop - fragment.start)
    piece = nn.Parameter(view.clone(memory_format=torch.contiguous_format), requires_grad=parameter.requires_grad)
    subnetwork.replaced.setdefault(id(parameter), []).append(piece)
    return piece


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
