"""What a parameter is while its values are not there (ZeRO-3): the same object, and an error in words when read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.errors import StateError

_WORDS = (
    "this weight is sharded over its owners (ZeRO stage 3) and not in memory between uses: read it inside `with "
    "engine.gathered_weights(layer):`, or take engine.full_state_dict() or engine.save_hf(); after "
    "engine.destroy() it is gone"
)

# Properties that lead to values; all others can be read and set.
_VALUES = frozenset({"data", "T", "H", "mT", "mH", "real", "imag"})
# What is answered without values. DeepSpeed finds a parameter's node in the graph by ``view_as``.
_ANSWERED = frozenset({
    "__hash__", "__len__", "backward", "dim", "element_size", "empty_like", "get_device", "grad", "is_complex",
    "is_contiguous", "is_floating_point", "is_signed", "nelement", "numel", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "size", "stride", "view_as", "zeros_like",
})  # fmt: skip


class FreedWeight(nn.Parameter):
    """The class of a parameter while it is freed. Shape, dtype, device, gradient and hooks are as ever.

    What goes past Python finds NaN (:func:`nothing_of`): no memory is read that is not there.

    Raises:
        StateError: of any use of its values.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            is_answered = func.__self__.__name__ not in _VALUES  # type: ignore[attr-defined]
        else:
            is_answered = name in _ANSWERED
        if not is_answered:
            raise StateError(_WORDS)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter of shape {list(self.shape)}, {self.dtype}, without values: {_WORDS}"


def give_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Let a parameter, freed or not, be one with ``values``."""
    if isinstance(parameter, FreedWeight):
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
    parameter.data = values


def take_values(parameter: nn.Parameter, nothing: torch.Tensor) -> None:
    """Free a parameter; ``nothing`` is :func:`nothing_of` it."""
    parameter.data = nothing
    if type(parameter) is nn.Parameter:
        parameter.__class__ = FreedWeight


def nothing_of(parameter: torch.Tensor) -> torch.Tensor:
    """NaN in the shape of ``parameter``, in the memory of one element."""
    return torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
