"""A client's parameter groups, split so that every group belongs to one owner set."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.optimizer import OWNER_SET_KEY
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.subnetwork import Subnetwork


def split_by_owner_set(groups: Sequence[Mapping[str, Any]], subnetwork: Subnetwork) -> list[tuple[dict[str, Any], int]]:
    """Split every client group by owner set, in (client group, owner set) order, which all ranks share.

    Parameters may be the full model's (from before the cut) or the subnetwork's; the former become the fragments that
    took their place.

    Returns:
        pairs of a group with the client's own options, and the index of the client group it came from.

    Raises:
        ConfigError: a parameter belongs to neither model.
    """
    positions = subnetwork.positions()
    names = {id(parameter): name for name, parameter in subnetwork.module.named_parameters()}
    result = []
    for index, group in enumerate(groups):
        by_set: dict[int, list[nn.Parameter]] = {}
        # A group of frozen parameters alone would be one that ZeRO cannot flatten, on the owners alone.
        for parameter in filter(_is_trainable, _fragments_of(group["params"], names, subnetwork)):
            by_set.setdefault(subnetwork.owner_set(names[id(parameter)]), []).append(parameter)
        for owner_set in sorted(by_set):
            members = sorted(by_set[owner_set], key=lambda p: positions[names[id(p)]])
            result.append(({**group, "params": members, OWNER_SET_KEY: owner_set}, index))
    return result


def _is_trainable(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.numel() > 0


def _fragments_of(parameters: Any, names: Mapping[int, str], subnetwork: Subnetwork) -> list[nn.Parameter]:
    members: list[Any] = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    found: list[nn.Parameter] = []
    for parameter in members:
        if isinstance(parameter, tuple):  # (name, parameter), as named optimizers take them
            parameter = parameter[1]
        if id(parameter) in subnetwork.replaced:
            found += subnetwork.replaced[id(parameter)]
        elif id(parameter) in names:
            found.append(parameter)
        else:
            raise ConfigError(
                f"optimizer: a parameter of shape {list(parameter.shape)} is not the model's; takes parameters of the "
                "model that is given to initialize()"
            )
    return found


def split_optimizer(optimizer: torch.optim.Optimizer, subnetwork: Subnetwork) -> list[int]:
    """Split the groups of a client's optimizer in place.

    Returns:
        for every new group, the index of the client group it came from.

    Raises:
        ConfigError: the optimizer has stepped already: its state has the full model's shapes.
    """
    if any(optimizer.state.values()):
        raise ConfigError("optimizer: has state already; takes an optimizer that has not stepped")
    split = split_by_owner_set(optimizer.param_groups, subnetwork)
    optimizer.state.clear()
    optimizer.param_groups[:] = [group for group, _ in split]
    return [index for _, index in split]


def split_scheduler(scheduler: Any, origins: Sequence[int], client_groups: int) -> None:
    """Give a torch LR scheduler, built on the client's groups, one entry per new group.

    Per-group attributes (``base_lrs``, ``lr_lambdas``, ...) are its lists with one entry per client group. A scheduler
    made of others (``SequentialLR``, ``ChainedScheduler``) hands this on to them.
    """
    for part in getattr(scheduler, "_schedulers", ()):
        split_scheduler(part, origins, client_groups)
    for name, value in vars(scheduler).items():
        if name in ("_schedulers", "_milestones"):
            continue
        if isinstance(value, list) and len(value) == client_groups:
            setattr(scheduler, name, [value[origin] for origin in origins])
