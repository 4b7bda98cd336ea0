"""An adapter tried out: a tiny model of the same class is cut, and must be the full one without the missing units.

What names and shapes cannot tell shows here: a norm that both branches read, a weight that an adapter forgot, heads
that are not where it says, a stand-in that returns something else.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepspeed_sdp.adapters import Adapter, Block, BlockUnit, Layer, PartitionedModule
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.plan import Chunk, PlannedSpace, SubnetworkPlan, UnitSpace
from deepspeed_sdp.subnetwork.cut import cut_model
from deepspeed_sdp.subnetwork.subnetwork import Masking

T = TypeVar("T")

# Where a config says its sizes in other words, its model may not have become tiny.
_MOST_PARAMETERS = 5_000_000
# Of the largest logit: rounding is far below, and anything that is computed differently far above.
_TOLERANCE = 1e-3
# Worker 0 has two chunks of a space, worker 1 has one, worker 2 has nothing.
_OWNER_SETS = ((0, 1, 2), (0,), (1,))

# By the adapter's identity, as it need not be hashable; it is held, so that no other one takes over its id.
_passed: dict[tuple[object, ...], Adapter] = {}


def try_adapter(
    model: nn.Module, adapter: Adapter, kinds: Sequence[str], block_unit: BlockUnit | None, masking: Masking
) -> None:
    """Try ``adapter`` on a tiny model of the class and config of ``model``, which itself is not run.

    A model that cannot be built small from its config, or does not run on the CPU, is not tried.

    Raises:
        ModelError: layers are not called one after the other; or a cut model cannot be computed, or computes something
            else than the full model from which the outputs of the missing units are taken away.
    """
    try:
        config, size = adapter.tiny(getattr(model, "config", None))
        if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa"):
            config._attn_implementation = "eager"
    except AttributeError:
        return
    key = (type(model), repr(config), id(adapter), tuple(kinds), block_unit, masking)
    if key in _passed:
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        # Not torch.manual_seed, which seeds accelerators too.
        torch.default_generator.manual_seed(0)
        trial = _Trial.of(type(model), config, adapter, size)
        if trial is not None:
            for kind in ("layer",) if block_unit == "layer" else kinds:
                trial.check(kind, block_unit, masking)
    _passed[key] = adapter


class _Trial:
    def __init__(self, full: nn.Module, adapter: Adapter, size: int) -> None:
        self.full, self.adapter = full, adapter
        self.inputs = adapter.task.example(full.config, 2, size, next(full.parameters()))
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        with _watched(adapter.layers(full), self.calls):
            self.logits(full)

    @classmethod
    def of(cls, model_class: type[nn.Module], config: Any, adapter: Adapter, size: int) -> "_Trial | None":
        try:
            with torch.device("meta"):
                numel = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
            if numel > _MOST_PARAMETERS:
                return None
            full = model_class(copy.deepcopy(config)).double().eval()
            _randomize(full)
            trial = cls(full, adapter, size)
        except Exception:  # whatever a model's own code may raise: it says nothing of the adapter
            return None
        trial.check_layers()
        return trial

    def logits(self, model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        output: Any = torch.func.functional_call(model, dict(weights or {}), (), self.inputs)
        return output.logits.detach()  # type: ignore[no-any-return]

    def fail(self, message: str) -> ModelError:
        name = type(self.full).__name__
        return ModelError(f"model: adapter {self.adapter.name!r}, tried on a tiny {name}: {message}")

    def check_layers(self) -> None:
        """Evaluation and ZeRO-3 take the layers one by one, each applied to what the one before it returned."""
        layers = [layer.module for layer in self.adapter.layers(self.full)]
        if [layer for layer, _, _ in self.calls] != layers:
            raise self.fail("the model does not call its layers once each, in their order")
        for _, _, output in self.calls:
            if not isinstance(output, torch.Tensor):
                raise self.fail(
                    f"a layer returns {type(output).__name__}; takes layers that return hidden states first"
                )
        for (_, _, output), (_, given, _) in itertools.pairwise(self.calls):
            if not torch.equal(output, given):
                raise self.fail("a layer is not given what the one before it returned")

    def check(self, kind: str, block_unit: BlockUnit | None, masking: Masking) -> None:
        """Compare workers that own units of ``kind`` here and there, in one piece, and not at all."""
        found: Sequence[PartitionedModule | Block] = (
            self.adapter.blocks(self.full, block_unit, (kind,))
            if block_unit
            else self.adapter.partitioned_modules(self.full, (kind,))
        )
        plan = _plan([item.space for item in found])
        for worker in range(plan.num_subnetworks):
            owns = "no unit" if worker == len(_OWNER_SETS) - 1 else "some units"
            who = f"a worker that owns {owns} of {kind!r} under {masking} masking"
            cut = self.tried(lambda w=worker: self.cut(plan, w, block_unit, masking), who)  # type: ignore[misc]
            actual = self.tried(lambda c=cut: self.logits(c), who)  # type: ignore[misc]
            silent = {} if masking == "backward" else self.silenced(found, plan, worker)
            expected = self.logits(self.full, silent)
            if actual.shape != expected.shape or (actual - expected).abs().max() > _TOLERANCE * expected.abs().max():
                raise self.fail(
                    f"{who} does not compute the full model without the others' units; absent units and branches must "
                    "add nothing, and nothing else may read what is cut or removed with them"
                )

    def cut(self, plan: SubnetworkPlan, worker: int, block_unit: BlockUnit | None, masking: Masking) -> nn.Module:
        model = copy.deepcopy(self.full)
        cut_model(model, plan, worker, masking=masking, block_unit=block_unit, adapter=self.adapter)
        return model

    def tried(self, work: Callable[[], T], who: str) -> T:
        try:
            return work()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise self.fail(f"{who} cannot be computed: {type(error).__name__}: {reason}") from error

    def silenced(
        self, found: Sequence[PartitionedModule | Block], plan: SubnetworkPlan, worker: int
    ) -> dict[str, torch.Tensor]:
        """Weights with which what ``worker`` does not own adds zero to the residual stream."""
        own = dict(self.full.named_parameters())
        weights: dict[str, torch.Tensor] = {}
        for item, planned in zip(found, plan.spaces, strict=True):
            absent = [chunk for chunk in planned.chunks if worker not in plan.owner_sets[chunk.owner_set]]
            if isinstance(item, Block):
                weights.update({name: torch.zeros_like(own[name]) for name in item.writes if absent})
                continue
            for tensor in item.tensors:
                if tensor.is_write:
                    weight = weights[tensor.name] = own[tensor.name].detach().clone()
                    for chunk in absent:
                        start, stop = chunk.start * tensor.width, chunk.stop * tensor.width
                        weight.narrow(tensor.dim, start, stop - start).zero_()
        return weights


def _plan(spaces: Sequence[UnitSpace]) -> SubnetworkPlan:
    planned = []
    for index, space in enumerate(spaces):
        number = min(space.num_units, 3)
        borders = [i * space.num_units // number for i in range(number + 1)]
        pieces = enumerate(itertools.pairwise(borders))
        chunks = tuple(Chunk(start, stop, 1 + (index + i) % 2) for i, (start, stop) in pieces)
        planned.append(PlannedSpace(space, chunks))
    return SubnetworkPlan(3, 1, "random", 0, 1, _OWNER_SETS, tuple(planned))


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Values by which every weight shows: no zeros and ones as at the start."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1:].numel() ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


@contextmanager
def _watched(layers: Sequence[Layer], calls: list[tuple[nn.Module, Any, Any]]) -> Iterator[None]:
    """Notes each call of a layer: its hidden states before and after."""

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        calls.append((layer, args[0] if args else kwargs["hidden_states"], hidden))

    handles = [layer.module.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
