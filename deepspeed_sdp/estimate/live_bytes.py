"""Counting what lives: bytes of every storage that operators on the meta device make, until nothing holds it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows every storage that an operator returns; views and updates in place make none.

    What an operator takes and gives back inside of its kernel is not seen.

    Args:
        existing: tensors that count as nothing, such as weights.

    Attributes:
        now: bytes that live.
        peak: the most since :meth:`take_peak`.
    """

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in existing)
        self._existing = [tensor.untyped_storage() for tensor in existing]

    def take_peak(self) -> int:
        """The peak since the last call; the next one begins at what lives now."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # A model asks whether its positions are those of one whole sequence each, to leave the mask to the kernel.
            return True
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._follow(value)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        nbytes = storage.nbytes()
        weakref.finalize(storage, self._forget, nbytes).atexit = False
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes
