"""What autograd keeps for the backward pass, by module: measured, not inferred."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.engine.zero.freed_weight import FreedWeight


@dataclass
class SavedActivations:
    """Bytes of the tensors that autograd keeps, each storage once, by the name of the module that saved it first."""

    by_module: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.by_module.values())

    def within(self, prefix: str) -> int:
        """Bytes saved in the module ``prefix`` and those inside of it."""
        return sum(n for name, n in self.by_module.items() if f"{name}.".startswith(f"{prefix}."))


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Watch forward passes inside (``torch.autograd.graph.saved_tensors_hooks``). Weights and buffers do not count."""
    found = SavedActivations()
    there = (t for t in (*model.parameters(), *model.buffers()) if not isinstance(t, FreedWeight))
    seen = {t.untyped_storage().data_ptr() for t in there}
    running: list[str] = [""]
    alive: list[torch.Tensor] = []  # or an address could be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)
            found.by_module[running[-1]] = found.by_module.get(running[-1], 0) + storage.nbytes()
        return tensor

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for hook in hooks:
            hook.remove()
