"""One worker's subnetwork, as the engine sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from deepspeed_sdp.adapters import Adapter
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork.full_model import FullModel
from deepspeed_sdp.subnetwork.layout import Fragment, FullParameter

Masking = Literal["forward", "backward"]


@dataclass(frozen=True)
class Subnetwork:
    """What the engine needs to know about a cut model.

    Attributes:
        module: the cut model, the very object that was given.
        plan: who owns what.
        index: ``w``, the worker whose subnetwork this is.
        full: the model that it was cut from.
        masking: ``"forward"``: ``module`` lacks what is not owned; ``"backward"``: it is the full model.
        fragments: for every parameter name of ``module``, where it lies in the full model.
        partitioned: for every full parameter that is partitioned, its full shape and cut.
        views: for backward masking, parameters of ``module`` that are views of another one: name -> name of the other.
        frozen: for backward masking, names of parameters of ``module`` that are held, and not trained, by this worker:
            those not owned, and the full weights of which only views are trained.
        buffers: for every buffer of ``module`` that is a part of the full model's: that one, and which parts, in order.
        writes: names of the full parameters by which what the partitioned units add to the residual stream is
            multiplied.
        group_of: the client's parameter group of every full parameter that is in one, by name.
    """

    module: nn.Module
    plan: SubnetworkPlan
    index: int
    full: FullModel
    masking: Masking
    fragments: Mapping[str, Fragment]
    partitioned: Mapping[str, FullParameter]
    views: Mapping[str, str]
    frozen: frozenset[str]
    buffers: Mapping[str, tuple[FullParameter, tuple[Fragment, ...]]] = field(default_factory=dict)
    writes: frozenset[str] = frozenset()
    group_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The model family."""
        return self.full.adapter

    @property
    def full_order(self) -> tuple[str, ...]:
        """Names of all full parameters, in forward order."""
        return self.full.order

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, in forward order."""
        return tuple(layer.name for layer in self.adapter.layers(self.full.skeleton))

    @property
    def is_louder(self) -> bool:
        """Whether the full model adds more to the residual stream than the subnetworks that were trained."""
        return self.masking == "forward" and self.plan.coverage < 1.0

    @property
    def owned_numel(self) -> int:
        """Parameters that this worker owns, shared ones included."""
        return sum(p.numel() for name, p in self.module.named_parameters() if name not in self.frozen)

    @cached_property
    def worked_numel(self) -> tuple[int, int]:
        """Parameters outside of embeddings that this worker's forward pass uses, and of them those that it trains.

        By the plan, for at ZeRO-3 weights come and go.
        """
        model = self.full.skeleton
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
        return full_name in self.full.trainable and full_name in self.group_of

    def persistent_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """Buffers that are part of a state dict, by name."""
        found = []
        for name, buffer in self.module.named_buffers():
            parent, _, local = name.rpartition(".")
            if local not in self.module.get_submodule(parent)._non_persistent_buffers_set:
                found.append((name, buffer))
        return found
