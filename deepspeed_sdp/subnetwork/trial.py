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

from deepspeed_sdp.adapters import Adapter, Block, BlockUnit, PartitionedModule
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.plan import Chunk, PlannedSpace, SubnetworkPlan, UnitSpace
from deepspeed_sdp.subnetwork.cut import cut_model
from deepspeed_sdp.subnetwork.layout import FullParameter
from deepspeed_sdp.subnetwork.subnetwork import Masking

T = TypeVar("T")

_HEAD_DIM, _LAYERS, _VOCABULARY = 16, 2, 32
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
        config = tiny_config(getattr(model, "config", None))
    except AttributeError:
        return
    key = (type(model), repr(config), id(adapter), tuple(kinds), block_unit, masking)
    if key in _passed:
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        # Not torch.manual_seed, which seeds accelerators too.
        torch.default_generator.manual_seed(0)
        trial = _Trial.of(type(model), config, adapter)
        if trial is not None:
            for kind in ("layer",) if block_unit == "layer" else kinds:
                trial.check(kind, block_unit, masking)
    _passed[key] = adapter


class _Trial:
    def __init__(self, full: nn.Module, adapter: Adapter) -> None:
        self.full, self.adapter = full, adapter
        self.ids = torch.randint(0, _VOCABULARY, (2, 7))
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        with _watched(adapter.layers(full), self.calls):
            self.logits(full)

    @classmethod
    def of(cls, model_class: type[nn.Module], config: Any, adapter: Adapter) -> "_Trial | None":
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
            if size > _MOST_PARAMETERS:
                return None
            full = model_class(copy.deepcopy(config)).double().eval()
            _randomize(full)
            trial = cls(full, adapter)
        except Exception:  # whatever a model's own code may raise: it says nothing of the adapter
            return None
        trial.check_layers()
        return trial

    def logits(self, model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        inputs = {"input_ids": self.ids, "use_cache": False}
        output: Any = torch.func.functional_call(model, dict(weights or {}), (), inputs)
        return output.logits.detach()  # type: ignore[no-any-return]

    def fail(self, message: str) -> ModelError:
        name = type(self.full).__name__
        return ModelError(f"model: adapter {self.adapter.name!r}, tried on a tiny {name}: {message}")

    def check_layers(self) -> None:
        """Evaluation and ZeRO-3 take the layers one by one, each applied to what the one before it returned."""
        layers = list(self.adapter.layers(self.full))
        if [layer for layer, _, _ in self.calls] != layers:
            raise self.fail("the model does not call its layers once each, in their order")
        for _, _, output in self.calls:
            if not isinstance(output, torch.Tensor):
                raise self.fail(
                    f"a layer returns {type(output).__name__}; takes layers that return hidden states alone"
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
            actual = self.tried(lambda c=cut: self.logits(c[0]), who)  # type: ignore[misc]
            silent = {} if masking == "backward" else self.silenced(cut[1], plan, worker, block_unit is not None)
            expected = self.logits(self.full, silent)
            if actual.shape != expected.shape or (actual - expected).abs().max() > _TOLERANCE * expected.abs().max():
                raise self.fail(
                    f"{who} does not compute the full model without the others' units; absent units and branches must "
                    "add nothing, and nothing else may read what is cut or removed with them"
                )

    def cut(
        self, plan: SubnetworkPlan, worker: int, block_unit: BlockUnit | None, masking: Masking
    ) -> tuple[nn.Module, Mapping[str, FullParameter]]:
        model = copy.deepcopy(self.full)
        made = cut_model(model, plan, worker, masking=masking, block_unit=block_unit, adapter=self.adapter)
        return model, made.full.by_unit

    def tried(self, work: Callable[[], T], who: str) -> T:
        try:
            return work()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise self.fail(f"{who} cannot be computed: {type(error).__name__}: {reason}") from error

    def silenced(
        self, by_unit: Mapping[str, FullParameter], plan: SubnetworkPlan, worker: int, is_block: bool
    ) -> dict[str, torch.Tensor]:
        """Weights with which what ``worker`` does not own adds zero to the residual stream."""
        own = dict(self.full.named_parameters())
        weights: dict[str, torch.Tensor] = {}
        for full, planned in itertools.product(by_unit.values(), plan.spaces):
            if not full.is_write or not f"{full.space}.".startswith(f"{planned.space.name}."):
                continue
            weight = weights[full.name] = own[full.name].detach().clone()
            absent = [chunk for chunk in planned.chunks if worker not in plan.owner_sets[chunk.owner_set]]
            for chunk in absent:
                part = full.fragment(chunk.start, chunk.stop, chunk.owner_set)
                (weight if is_block else full.part_of(weight, part)).zero_()
            bias = f"{full.name.removesuffix('.weight')}.bias"
            if is_block and absent and bias in own:
                weights[bias] = torch.zeros_like(own[bias])
        return weights


def tiny_config(config: Any) -> Any:
    """A copy with few layers, heads, features and tokens, by the names that transformers has for them.

    Raises:
        AttributeError: it lacks one of these names.
    """
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    queries, kv_heads = min(heads // kv_heads, 2), min(kv_heads, 4)
    small.num_attention_heads = queries * kv_heads
    small.hidden_size = small.num_attention_heads * _HEAD_DIM
    if getattr(config, "num_key_value_heads", None):
        small.num_key_value_heads = kv_heads
    if getattr(config, "head_dim", None):
        small.head_dim = _HEAD_DIM
    for width in ("intermediate_size", "n_inner"):
        if getattr(config, width, None):
            setattr(small, width, 3 * _HEAD_DIM + 1)
    small.num_hidden_layers = min(config.num_hidden_layers, _LAYERS)
    if getattr(config, "layer_types", None):
        small.layer_types = list(config.layer_types)[: small.num_hidden_layers]
    small.vocab_size, small.pad_token_id = _VOCABULARY, None
    if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa"):
        small._attn_implementation = "eager"
    return small


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
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


@contextmanager
def _watched(layers: nn.ModuleList, calls: list[tuple[nn.Module, Any, Any]]) -> Iterator[None]:
    """Notes each call of a layer: its hidden states before and after."""

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((layer, args[0] if args else kwargs["hidden_states"], output))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
