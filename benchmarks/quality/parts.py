"""How the linears of one branch run for all workers at once, given who owns which units.

``N`` workers, ``M`` tokens of each, ``D`` hidden, ``F`` features of all units, ``U`` features of a worker's units.
``read`` maps the residual stream to units (``x_NMD``, weight ``[F, D]``), ``write`` maps them back (weight ``[D, F]``).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Owners = tuple[int, ...]


class Part(Protocol):
    """``enter`` the branch, ``read`` and ``write`` its linears, ``leave`` it. ``width``: features of one unit."""

    def enter(self, x_NMD: Tensor) -> Tensor: ...

    def read(self, x: Tensor, weight_FD: Tensor, width: int) -> Tensor: ...

    def only_owned(self, hidden: Tensor, width: int) -> Tensor: ...

    def write(self, hidden: Tensor, weight_DF: Tensor, width: int) -> Tensor: ...

    def leave(self, out: Tensor) -> Tensor: ...


class Whole:
    """Every worker has every unit."""

    def enter(self, x_NMD: Tensor) -> Tensor:
        return x_NMD

    def read(self, x: Tensor, weight_FD: Tensor, width: int) -> Tensor:
        return F.linear(x, weight_FD)

    def only_owned(self, hidden: Tensor, width: int) -> Tensor:
        return hidden

    def write(self, hidden: Tensor, weight_DF: Tensor, width: int) -> Tensor:
        return F.linear(hidden, weight_DF)

    def leave(self, out: Tensor) -> Tensor:
        return out


class Removed(Whole):
    """Forward masking: a worker computes with its own units alone, and what they add is scaled.

    Workers that own the same units are a team and are computed together.
    """

    def __init__(self, unit_owners: Sequence[Owners], num_workers: int, scale: float) -> None:
        self.scale = scale
        units = [[u for u, owners in enumerate(unit_owners) if w in owners] for w in range(num_workers)]
        teams: dict[tuple[int, ...], list[int]] = {}
        for worker, mine in enumerate(units):
            teams.setdefault(tuple(mine), []).append(worker)
        if len({len(workers) for workers in teams.values()}) > 1:  # teams of different size: everyone alone
            slices, order = [tuple(mine) for mine in units], list(range(num_workers))
        else:
            slices, order = list(teams), [w for workers in teams.values() for w in workers]
        self.num_slices = len(slices)
        self.order = None if order == sorted(order) else torch.tensor(order)
        self.back = torch.tensor(order).argsort()
        most = max(1, *(len(mine) for mine in slices))
        # Workers with fewer units get unit 0 besides, times zero.
        self.units_SU = torch.tensor([[*mine, *[0] * (most - len(mine))] for mine in slices])
        self.sizes = [len(mine) for mine in slices]
        self._features: dict[int, Tensor] = {}

    def enter(self, x_NMD: Tensor) -> Tensor:
        if self.order is not None:
            x_NMD = x_NMD.index_select(0, self.order)
        return x_NMD.reshape(self.num_slices, -1, x_NMD.shape[-1])

    def read(self, x: Tensor, weight_FD: Tensor, width: int) -> Tensor:
        weight_SUD = take(weight_FD, self.features(width), self._lengths(width))
        return torch.bmm(x, weight_SUD.transpose(1, 2))

    def only_owned(self, hidden: Tensor, width: int) -> Tensor:
        most = self.units_SU.shape[1]
        if min(self.sizes) == most:
            return hidden
        keep = torch.arange(most)[None] < torch.tensor(self.sizes)[:, None]
        return hidden * keep.repeat_interleave(width, 1)[:, None]

    def write(self, hidden: Tensor, weight_DF: Tensor, width: int) -> Tensor:
        weight_SUD = take(weight_DF.t(), self.features(width), self._lengths(width))
        return torch.bmm(hidden, weight_SUD)

    def leave(self, out: Tensor) -> Tensor:
        out_NMD = out.reshape(len(self.back), -1, out.shape[-1])
        if self.order is not None:
            out_NMD = out_NMD.index_select(0, self.back)
        return out_NMD if self.scale == 1.0 else out_NMD * self.scale

    def features(self, width: int) -> Tensor:
        """``[S, U]``: the features of every slice's units."""
        if width not in self._features:
            self._features[width] = (self.units_SU[..., None] * width + torch.arange(width)).flatten(1)
        return self._features[width]

    def _lengths(self, width: int) -> list[int]:
        return [size * width for size in self.sizes]


def take(weight_FD: Tensor, features_SU: Tensor, lengths: list[int]) -> Tensor:
    """``weight[features]``, ``[S, U, D]``; what lies behind a slice's length gets no gradient."""
    taken: Tensor = _Take.apply(weight_FD, features_SU, lengths)
    return taken


class _Take(torch.autograd.Function):
    """Indexing whose backward adds slice by slice: ``index_add`` goes row by row and takes longer than the matmul."""

    @staticmethod
    def forward(ctx: Any, weight_FD: Tensor, features_SU: Tensor, lengths: list[int]) -> Tensor:
        ctx.features_SU, ctx.lengths, ctx.shape = features_SU, lengths, weight_FD.shape
        return weight_FD.index_select(0, features_SU.flatten()).view(*features_SU.shape, weight_FD.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_SUD,) = grads
        total = grad_SUD.new_zeros(ctx.shape)
        for features, length, grad in zip(ctx.features_SU, ctx.lengths, grad_SUD, strict=True):
            mine = features[:length]
            total[mine] = total[mine] + grad[:length]
        return total, None, None


class Frozen(Whole):
    """Backward masking: every worker computes with all units, and only owners give a gradient of their weights."""

    def __init__(self, unit_owners: Sequence[Owners]) -> None:
        self.units: dict[Owners, list[int]] = {}
        for unit, owners in enumerate(unit_owners):
            self.units.setdefault(owners, []).append(unit)
        self._features: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def read(self, x: Tensor, weight_FD: Tensor, width: int) -> Tensor:
        out: Tensor = _OwnersGradient.apply(x, weight_FD, self.features(width), True)
        return out

    def write(self, hidden: Tensor, weight_DF: Tensor, width: int) -> Tensor:
        out: Tensor = _OwnersGradient.apply(hidden, weight_DF, self.features(width), False)
        return out

    def features(self, width: int) -> list[tuple[Tensor, Tensor]]:
        """For every owner set its workers and the features that it owns."""
        if width not in self._features:
            self._features[width] = [
                (torch.tensor(owners), (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten())
                for owners, units in self.units.items()
            ]
        return self._features[width]


class _OwnersGradient(torch.autograd.Function):
    """``x_NMI @ weight_OI.T`` whose weight gradient comes from the owners' samples, feature by feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, features: list[tuple[Tensor, Tensor]], is_read: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.features, ctx.is_read = features, is_read
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight)
        for owners, mine in ctx.features:
            out, inputs = grad.index_select(0, owners), x.index_select(0, owners)
            if ctx.is_read:
                grad_weight[mine] = out.index_select(2, mine).flatten(0, 1).t() @ inputs.flatten(0, 1)
            else:
                grad_weight[:, mine] = out.flatten(0, 1).t() @ inputs.index_select(2, mine).flatten(0, 1)
        return grad @ weight, grad_weight, None, None
