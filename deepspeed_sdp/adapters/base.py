"""What an adapter says about a model family: which modules fall apart into units, and how their tensors do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deepspeed_sdp.adapters.tasks import Task
from deepspeed_sdp.plan import UnitSpace


@dataclass(frozen=True)
class PartitionedTensor:
    """How a parameter, or a buffer, of the model follows the units of its space.

    Attributes:
        name: in the model.
        dim: along which the units lie.
        width: entries of one unit along ``dim``.
        groups: ``dim`` is so many equal parts, in each of which a unit has its entries; 3 where queries, keys and
            values of all heads lie one after the other.
        is_write: whether its product is added to the residual stream, and nothing else is.
        is_input_kept: whether what computes that product's other factor keeps it for its own backward pass, as
            attention kernels do.
    """

    name: str
    dim: int
    width: int = 1
    groups: int = 1
    is_write: bool = False
    is_input_kept: bool = False

    @property
    def module(self) -> str:
        """Name of the module that has it."""
        return self.name.rpartition(".")[0]

    @property
    def local(self) -> str:
        """Its name there."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class PartitionedModule:
    """One unit space at neuron granularity and the tensors that it cuts; the space's name is that of a module.

    Attributes:
        space: of its units.
        tensors: that they cut, of this module or beside it in the layer.
        is_gated: whether the module computes ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` with SiLU as activation,
            and nothing else.
        widths: attributes of the module that count features, with the number per unit; a smaller module gets smaller
            ones.
        positions: how often a sample uses the weights: 1 for the token of a text, the tokens or pixels of an image.
        norm: the module behind the space's writes that normalises their sum, and joins the residual stream in their
            place; what scales them acts behind it.
    """

    space: UnitSpace
    tensors: tuple[PartitionedTensor, ...]
    is_gated: bool = False
    widths: tuple[tuple[str, int], ...] = ()
    positions: float = 1.0
    norm: str | None = None


@dataclass(frozen=True)
class Block:
    """A unit at block granularity: a whole residual block, owned or absent.

    Attributes:
        space: one unit; its name is the module's that adds to the residual stream.
        norms: modules beside it that serve it alone (its input norm), absent with it.
        writes: names of the parameters in it by which everything that it adds to the residual stream is multiplied.
        positions: see :class:`PartitionedModule`.
    """

    space: UnitSpace
    norms: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    positions: float = 1.0


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


class Layer(NamedTuple):
    """A layer of the model: its name, and the module."""

    name: str
    module: nn.Module


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

    @property
    def task(self) -> Task:
        """What its models are trained for."""

    def knows(self, model: nn.Module) -> bool:
        """Whether the attribute names of ``model`` are those of this family."""

    def partitioned_modules(
        self, model: nn.Module, kinds: Sequence[str], size: int | None = None
    ) -> list[PartitionedModule]:
        """The unit spaces of the kinds asked for, in forward order.

        FLOPs are those of a sample of ``size``: tokens of a sequence, pixels of an image's side; ``None``: as the
        model's config says, or a usual one.
        """

    def blocks(
        self, model: nn.Module, block_unit: BlockUnit, kinds: Sequence[str], size: int | None = None
    ) -> list[Block]:
        """The residual blocks, in forward order: layers, or their branches of the kinds asked for."""

    def layers(self, model: nn.Module) -> list[Layer]:
        """The layers, in forward order; each is called once, on what the one before returned or what became of it."""

    def absent(self, kind: str, module: nn.Module) -> "type[AbsentModule]":
        """What stands in for ``module``, of which a worker owns no unit."""

    def init_scale(self, model: nn.Module, parameter: str) -> float:
        """What initial values of one full parameter are multiplied by, where no module of its own says it."""

    def tiny(self, config: Any) -> tuple[Any, int]:
        """A copy of ``config`` with few layers and features, to try the adapter on, and the size of a sample.

        Raises:
            AttributeError: it says its sizes in other words.
        """

    def with_layers(self, config: Any, kept: Sequence[int]) -> Any:
        """A copy of ``config`` with the layers of these numbers alone; ``None`` where it cannot say that."""


def matmul_flops(numel: int, positions: float = 1.0) -> float:
    """Training FLOPs of a sample that uses ``numel`` weights so often: 2 forward, 4 backward each."""
    return 6.0 * numel * positions


def weight_gradient_flops(numel: int, positions: float = 1.0) -> float:
    """The part of :func:`matmul_flops` that computes the gradient of the weights."""
    return 2.0 * numel * positions


def attention_flops(heads: int, head_dim: int, length: int) -> float:
    """Training FLOPs per token of scores and weighted values over ``length``, without use of the causal half."""
    return 12.0 * heads * head_dim * length


def is_linear(module: object) -> bool:
    """Whether it is a linear layer that can be cut."""
    return isinstance(module, nn.Linear | Conv1D)


def features_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or a convolution."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def outputs_of(name: str, module: nn.Module, width: int = 1, groups: int = 1) -> tuple[PartitionedTensor, ...]:
    """A unit is ``width`` outputs of ``module`` (with ``groups``: of each of so many parts): rows of its weight, and
    of its bias."""
    names = [f"{name}.weight"] + [f"{name}.bias"] * (module.bias is not None)
    # GPT-2's linears hold their weights as [in, out].
    dims = [int(isinstance(module, Conv1D)), 0]
    return tuple(PartitionedTensor(n, dim, width, groups) for n, dim in zip(names, dims, strict=False))


def inputs_of(
    name: str, module: nn.Module, width: int = 1, *, is_input_kept: bool = False, is_write: bool = True
) -> tuple[PartitionedTensor, ...]:
    """A unit is ``width`` inputs of ``module``: columns of its weight. Its bias is shared, and its output joins the
    residual stream."""
    dim = int(not isinstance(module, Conv1D))
    return (PartitionedTensor(f"{name}.weight", dim, width, 1, is_write, is_input_kept),)


def channels_of(name: str, norm: nn.Module) -> tuple[PartitionedTensor, ...]:
    """A unit is one channel of ``norm``: of its weights and of its running statistics."""
    tensors = [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]
    return tuple(PartitionedTensor(f"{name}.{local}", 0) for local, tensor in tensors if tensor.dim())


def unit_numel(model: nn.Module, module: PartitionedModule) -> int:
    """Parameters of one unit; buffers are none, and the shared bias behind its inputs is no unit's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = [parameters[tensor.name].numel() for tensor in module.tensors if tensor.name in parameters]
    return sum(own) // module.space.num_units
