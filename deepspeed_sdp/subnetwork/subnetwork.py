"""One worker's subnetwork, as the engine sees it."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters import Adapter
from deepspeed_sdp.plan import SubnetworkPlan
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
        first_ranks: for every worker, the lowest rank that trains its subnetwork; by default its own number.
        full_order: names of all full parameters, in forward order.
        full_config: configuration of the full model.
        generation_config: its generation settings, if it has any.
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
    first_ranks: tuple[int, ...] = ()
    full_order: tuple[str, ...] = ()
    full_config: Any = None
    generation_config: Any = None
    model_class: type[nn.Module] = nn.Module
    replaced: dict[int, list[nn.Parameter]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first_ranks = self.first_ranks or tuple(range(self.plan.num_subnetworks))

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


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
