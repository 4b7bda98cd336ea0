"""A client's parameter groups, translated to the parameters of a subnetwork."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, constants, state_like
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.ranks import reduce_numbers
from deepspeed_sdp.subnetwork import ClientMap, Subnetwork


def translate_groups(
    groups: Sequence[Mapping[str, Any]], subnetwork: Subnetwork, client: ClientMap
) -> list[dict[str, Any]]:
    """The client's groups with the trainable fragments that took the place of their parameters.

    Parameters may be the full model's (from before the cut) or the subnetwork's. A group keeps its options and gets its
    index under ``GROUP_KEY``; it may end up empty. ``client.group_of`` learns the index of every full parameter.

    Raises:
        ConfigError: a parameter belongs to neither model.
    """
    names = {id(parameter): name for name, parameter in subnetwork.module.named_parameters()}
    translated = []
    for index, group in enumerate(groups):
        members: dict[nn.Parameter, None] = {}
        for parameter in _members(group["params"]):
            key = id(parameter)
            if key not in client.replaced and key not in names:
                raise ConfigError(
                    f"optimizer: a parameter of shape {list(parameter.shape)} is not the model's; takes parameters of "
                    "the model that is given to initialize()"
                )
            full_name = client.names[key] if key in client.names else subnetwork.fragments[names[key]].full_name
            client.group_of[full_name] = index
            members |= dict.fromkeys(client.replaced.get(key, [parameter]))
        trained = [parameter for parameter in members if parameter.requires_grad and parameter.numel() > 0]
        translated.append({**group, "params": trained, GROUP_KEY: index})
    return translated


def agree_on_groups(mine: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Collective. What any rank's client put into a group, by full parameter (``names``: of all); each tells ``mine``.

    A client that picks parameters by ``requires_grad`` sees of the full model what this rank trains, no more.

    Raises:
        ConfigError: ranks put a parameter into different groups; on every rank.
    """
    what = "agreeing on parameter groups"
    # Nobody's group is so high: a parameter that no rank knows has it as its lowest, and its negative as its highest.
    none = 2**62
    told = [[sign * mine[name] if name in mine else none for name in names] for sign in (1, -1)]
    lowest, highest = reduce_numbers(torch.tensor(told), what, dist.ReduceOp.MIN).tolist()
    for name, low, high in zip(names, lowest, highest, strict=True):
        if low != none and low != -high:
            here = torch.tensor(dist.get_rank() if mine.get(name) == -high else dist.get_world_size())
            raise ConfigError(
                f"optimizer.param_groups: {name} is in group {-high} on rank "
                f"{int(reduce_numbers(here, what, dist.ReduceOp.MIN))}, and in group {low} on another; takes the same "
                "groups on all ranks"
            )
    return {name: low for name, low in zip(names, lowest, strict=True) if low != none}


def translate_optimizer(optimizer: torch.optim.Optimizer, subnetwork: Subnetwork, client: ClientMap) -> None:
    """Translate the groups of a client's optimizer in place, with the state that its constructor made.

    Raises:
        ConfigError: the optimizer has stepped already: its state has the full model's shapes.
    """
    initial = [
        next(iter([constants(optimizer.state[p]) for p in _members(group["params"]) if optimizer.state.get(p)]), {})
        for group in optimizer.param_groups
    ]
    groups = translate_groups(optimizer.param_groups, subnetwork, client)
    optimizer.state.clear()
    # The very dicts, which a scheduler may hold.
    for group, translated, state in zip(optimizer.param_groups, groups, initial, strict=True):
        group.update(translated)
        for parameter in group["params"] if state else ():
            optimizer.state[parameter].update(state_like(state, parameter))


def describe_groups(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[list[str]]:
    """Names in ``model`` of every group's parameters, for ranks to compare; those of another model as ``"?"``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(parameter), "?") for parameter in _members(group["params"])] for group in groups]


def as_groups(model_parameters: Any) -> list[dict[str, Any]]:
    """A list of groups out of what a torch optimizer takes."""
    parameters = list(model_parameters)
    if parameters and isinstance(parameters[0], dict):
        return parameters
    return [{"params": parameters}]


def _members(parameters: Any) -> list[Any]:
    members: list[Any] = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    # (name, parameter), as named optimizers take them
    return [parameter[1] if isinstance(parameter, tuple) else parameter for parameter in members]
