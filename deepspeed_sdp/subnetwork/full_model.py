"""The full model that subnetworks are parts of, as it was before the cut."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.adapters import Adapter
from deepspeed_sdp.subnetwork.layout import FullParameter


@dataclass(frozen=True)
class FullModel:
    """What is the same on all ranks, and told by no subnetwork.

    Attributes:
        adapter: the model family.
        model_class: of the model.
        config, generation_config: copies of the model's; ``None`` where it has none.
        order: names of all parameters, in forward order.
        trainable: names of those that take gradients.
        by_unit: for every parameter that could be partitioned, its shape and cut; initial values are drawn by these
            units, so that they do not depend on what is partitioned.
    """

    adapter: Adapter
    model_class: type[nn.Module]
    config: Any
    generation_config: Any
    order: tuple[str, ...]
    trainable: frozenset[str]
    by_unit: Mapping[str, FullParameter]

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device, to evaluate: shapes and names, no memory. Built once; not to be changed."""
        model: Any = skeleton_of(self.model_class, self.config).eval()
        if self.generation_config is not None:
            model.generation_config = copy.deepcopy(self.generation_config)
        return model  # type: ignore[no-any-return]

    def new_skeleton(self) -> nn.Module:
        """A copy of :attr:`skeleton`, to be filled or cast."""
        return copy.deepcopy(self.skeleton)


def skeleton_of(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A model on the meta device, built from its config."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))
