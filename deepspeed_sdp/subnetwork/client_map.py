"""What became of the full model's parameters, for references to them from before the cut."""

from collections.abc import Mapping

from torch import nn


class ClientMap:
    """Filled while a model is cut and materialised; needed no longer than a client's optimizer is translated.

    Args:
        model: the full model; what it holds must be held until the cut is done, or a new parameter could take over the
            ``id`` of an old one.

    Attributes:
        names: name of every full parameter, by ``id``.
        replaced: the parameters that took its place, by ``id`` of a full parameter.
        group_of: the client's parameter group of every full parameter that is in one, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.replaced: dict[int, list[nn.Parameter]] = {}
        self.group_of: dict[str, int] = {}

    def renew(self, fresh: Mapping[int, nn.Parameter]) -> None:
        """Parameters on the meta device (by ``id``) have given way to real ones."""
        for replacements in self.replaced.values():
            replacements[:] = [fresh.get(id(parameter), parameter) for parameter in replacements]
        for old, parameter in fresh.items():
            self.replaced.setdefault(old, [parameter])
