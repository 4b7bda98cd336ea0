"""One worker's subnetwork, as the engine sees it."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from deepspeed_sdp.adapters import Adapter
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork.as_configured import full_skeleton
from deepspeed_sdp.subnetwork.layout import Fragment, FullParameter


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
        generation_config: its generation settings, if it has any.
        model_class: class of the full model.
        replaced: full parameter (by ``id``) -> the parameters that took its place.
        full_names: full parameter (by ``id``) -> its name, from before the cut.
        trainable: names of the full parameters that take gradients.
        group_of: the client's parameter group of every full parameter that is in one, by name.
        masking: ``"forward"``: ``module`` lacks what is not owned; ``"backward"``: it is the full model.
        views: for backward masking, parameters of ``module`` that are views of another one: name -> name of the other.
        frozen: for backward masking, names of parameters of ``module`` that are held, and not trained, by this worker:
            those not owned, and the full weights of which only views are trained.
        full_scale: what the full model's writes are multiplied by when it is put together, under forward masking; see
            :mod:`deepspeed_sdp.engine.full.calibration`.
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
    generation_config: Any = None
    model_class: type[nn.Module] = nn.Module
    replaced: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    full_names: dict[int, str] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    group_of: dict[str, int] = field(default_factory=dict)
    masking: Literal["forward", "backward"] = "forward"
    views: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    full_scale: float = 1.0

    @property
    def is_louder(self) -> bool:
        """Whether the full model adds more to the residual stream than the subnetworks that were trained."""
        return self.masking == "forward" and self.plan.coverage < 1.0

    @property
    def writes(self) -> frozenset[str]:
        """Names of the partitioned parameters whose products are added to the residual stream."""
        return frozenset(name for name, parameter in self.partitioned.items() if parameter.is_write)

    @property
    def owned_numel(self) -> int:
        """Parameters that this worker owns, shared ones included."""
        return sum(p.numel() for name, p in self.module.named_parameters() if name not in self.frozen)

    @cached_property
    def worked_numel(self) -> tuple[int, int]:
        """Parameters outside of embeddings that this worker's forward pass uses, and of them those that it trains.

        By the plan, for at ZeRO-3 weights come and go.
        """
        model = self.full_skeleton()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        full = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
        partitioned = sum(planned.space.num_units * planned.space.unit_numel for planned in self.plan.spaces)
        trained = full - partitioned + self.plan.owned_numel(self.index)
        return full if self.masking == "backward" else trained, trained

    def link_views(self) -> None:
        """Let every view share memory with the parameter that it is a view of; a cast or a move gives it its own."""
        for name, full_name in self.views.items():
            full = self.module.get_parameter(full_name)
            part = self.partitioned[full_name].part_of(full.data, self.fragments[name])
            self.module.get_parameter(name).data = part

    def owner_set(self, name: str) -> int:
        """Index of the owner set of parameter ``name`` of :attr:`module`."""
        return self.fragments[name].owner_set

    def positions(self) -> dict[str, tuple[int, int]]:
        """For every parameter name of :attr:`module`: (place of the full parameter in forward order, start in it).

        Equal on all ranks for the same fragment, and so the base of every order that ranks must share.
        """
        places = {name: i for i, name in enumerate(self.full_order)}
        return {name: (places[fragment.full_name], fragment.start) for name, fragment in self.fragments.items()}

    def is_trained(self, full_name: str) -> bool:
        """Whether a parameter of the full model takes gradients and is in one of the client's groups."""
        return full_name in self.trainable and full_name in self.group_of

    def persistent_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """Buffers that are part of a state dict, by name."""
        found = []
        for name, buffer in self.module.named_buffers():
            parent, _, local = name.rpartition(".")
            if local not in self.module.get_submodule(parent)._non_persistent_buffers_set:
                found.append((name, buffer))
        return found

    def full_skeleton(self) -> nn.Module:
        """The full model on the meta device: shapes and names, no memory."""
        model: Any = full_skeleton(self.model_class, self.full_config)
        if self.generation_config is not None:
            model.generation_config = copy.deepcopy(self.generation_config)
        return model  # type: ignore[no-any-return]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
