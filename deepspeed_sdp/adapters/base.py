"""What an adapter says about a model family: which modules fall apart into units, and how their weights do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deepspeed_sdp.plan import UnitSpace


@dataclass(frozen=True)
class PartitionedLinear:
    """How an ``nn.Linear``, or a ``Conv1D`` of transformers, follows the units of its space.

    Attributes:
        name: name relative to the space's module, e.g. ``"gate_proj"``.
        cut: ``"out"``: a unit is ``features_per_unit`` rows of the weight (and of the bias);
            ``"in"``: it is ``features_per_unit`` columns, the bias is shared, and the output joins the residual stream.
        features_per_unit: features of one unit along the cut dimension.
        groups: the cut dimension is so many equal parts, in each of which a unit has its features; 3 where queries,
            keys and values of all heads lie one after the other.
        is_input_kept: whether what computes its input keeps that for its own backward pass, as attention kernels do.
    """

    name: str
    cut: Literal["out", "in"]
    features_per_unit: int
    is_input_kept: bool = False
    groups: int = 1


@dataclass(frozen=True)
class PartitionedModule:
    """One unit space at neuron granularity and the linears that it cuts; the space's name is the module's.

    Attributes:
        space: of its units.
        linears: that they cut.
        is_gated: whether the module computes ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` with SiLU as activation,
            and nothing else.
        widths: attributes of the module that count features, with the number per unit; a smaller module gets smaller
            ones.
    """

    space: UnitSpace
    linears: tuple[PartitionedLinear, ...]
    is_gated: bool = False
    widths: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Block:
    """A unit at block granularity: a whole residual block, owned or absent.

    Attributes:
        space: one unit; its name is the module's that adds to the residual stream.
        norms: modules beside it that serve it alone (its input norm), absent with it.
    """

    space: UnitSpace
    norms: tuple[str, ...] = ()


BlockUnit = Literal["layer", "branch"]


class AbsentModule(nn.Module):
    """A module without units: it adds nothing but its output bias to the residual stream.

    Its shared parameters stay, since every worker owns them: ``bias`` (of the linear with an ``"in"`` cut) and
    ``unused`` (per-head norms and the like, which get no gradient here).
    """

    def __init__(self, bias: nn.Parameter | None = None, unused: Sequence[nn.Parameter] = ()) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.unused = nn.ParameterList(unused)

    def residue(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., hidden]``: the bias, or zero."""
        zero = torch.zeros_like(x)
        return zero if self.bias is None else zero + self.bias


class Adapter(Protocol):
    """A model family. One file each; see ``llama.py``."""

    @property
    def name(self) -> str:
        """Short name, for messages."""

    @property
    def families(self) -> tuple[str, ...]:
        """The families of transformers that it serves, for messages."""

    @property
    def units(self) -> Mapping[str, str]:
        """Kind of unit -> what one is, for people."""

    def knows(self, model: nn.Module) -> bool:
        """Whether the attribute names of ``model`` are those of this family."""

    def partitioned_modules(
        self, model: nn.Module, kinds: Sequence[str], seq_length: int = 2048
    ) -> list[PartitionedModule]:
        """The unit spaces of the kinds asked for, in forward order; FLOPs are counted at ``seq_length``."""

    def blocks(
        self, model: nn.Module, block_unit: BlockUnit, kinds: Sequence[str], seq_length: int = 2048
    ) -> list[Block]:
        """The residual blocks, in forward order: decoder layers, or their branches of the kinds asked for."""

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, in forward order."""

    def absent(self, kind: str) -> "type[AbsentModule]":
        """What stands in for a module of which a worker owns no unit."""

    def init_scale(self, model: nn.Module, parameter: str) -> float:
        """What initial values of one full parameter are multiplied by, where no module of its own says it."""


def matmul_flops(numel: int) -> float:
    """Training FLOPs per token of ``numel`` weights: 2 forward, 4 backward each."""
    return 6.0 * numel


def weight_gradient_flops(numel: int) -> float:
    """The part of :func:`matmul_flops` that computes the gradient of the weights."""
    return 2.0 * numel


def attention_flops(heads: int, head_dim: int, seq_length: int) -> float:
    """Training FLOPs per token of scores and weighted values, without use of the causal half."""
    return 12.0 * heads * head_dim * seq_length


def is_linear(module: object) -> bool:
    """Whether it is a linear layer that can be cut."""
    return isinstance(module, nn.Linear | Conv1D)


def features_of(linear: nn.Module) -> tuple[int, int]:
    """Input and output features."""
    assert isinstance(linear, nn.Linear | Conv1D)
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def linear_numel(linear: nn.Module, spec: PartitionedLinear) -> int:
    """Parameters of one unit in ``linear`` (the shared bias of an ``"in"`` cut belongs to no unit)."""
    in_features, out_features = features_of(linear)
    if spec.cut == "in":
        return spec.features_per_unit * out_features
    return spec.features_per_unit * spec.groups * (in_features + (linear.bias is not None))
