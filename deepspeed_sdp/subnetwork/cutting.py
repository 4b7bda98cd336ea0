"""A model while it is being cut."""

from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork.client_map import ClientMap
from deepspeed_sdp.subnetwork.full_model import FullModel
from deepspeed_sdp.subnetwork.layout import SHARED, Fragment, FullParameter
from deepspeed_sdp.subnetwork.subnetwork import Masking, Subnetwork


@dataclass
class Cutting:
    """What is known so far of a :class:`Subnetwork`, with its names, and of references to what it was cut from."""

    module: nn.Module
    plan: SubnetworkPlan
    index: int
    full: FullModel
    masking: Masking
    client: ClientMap
    fragments: dict[str, Fragment] = field(default_factory=dict)
    partitioned: dict[str, FullParameter] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    buffers: dict[str, tuple[FullParameter, tuple[Fragment, ...]]] = field(default_factory=dict)
    writes: set[str] = field(default_factory=set)

    def slice(self, parameter: torch.Tensor, fragment: Fragment) -> nn.Parameter:
        """A parameter of its own for ``fragment`` of a full parameter."""
        view = self.full.by_unit[fragment.full_name].part_of(parameter.detach(), fragment)
        piece = nn.Parameter(view.clone(memory_format=torch.contiguous_format), requires_grad=parameter.requires_grad)
        self.client.replaced.setdefault(id(parameter), []).append(piece)
        return piece

    def done(self) -> Subnetwork:
        """The subnetwork; parameters of which nothing was said are shared."""
        for name, _ in self.module.named_parameters():
            self.fragments.setdefault(name, Fragment(name, SHARED))
        return Subnetwork(
            self.module,
            self.plan,
            self.index,
            self.full,
            self.masking,
            MappingProxyType(self.fragments),
            MappingProxyType(self.partitioned),
            MappingProxyType(self.views),
            frozenset(self.frozen),
            MappingProxyType(self.buffers),
            frozenset(self.writes),
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
