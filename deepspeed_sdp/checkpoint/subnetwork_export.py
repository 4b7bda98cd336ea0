"""One worker's subnetwork as a smaller model of the same family."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deepspeed_sdp.adapters import PartitionedModule, PartitionedTensor, find_adapter
from deepspeed_sdp.checkpoint.meta import read_plan
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import meta_model
from deepspeed_sdp.subnetwork.cut import output_scale

# Sizes in the config of every family so far; each is one number for all layers.
_WIDTH, _KV_HEADS, _HEADS = "intermediate_size", "num_key_value_heads", "num_attention_heads"


def carve(
    checkpoint: Path, meta: dict[str, Any], config: Any, worker: int, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of subnetwork ``worker``; ``config`` is changed to its sizes.

    What scales the output of its units in training is multiplied into their weights.

    Raises:
        CheckpointError: no such worker; it was not trained as a model of its own (backward masking); or a config of the
            family has no words for it.
    """
    plan = read_plan(checkpoint)
    block = meta["subnetwork_data_parallel"]
    if not 0 <= worker < plan.num_subnetworks:
        raise CheckpointError(f"--subnetwork: got {worker}; takes 0 to {plan.num_subnetworks - 1}")
    if block["masking"] != "forward":
        raise CheckpointError(
            '--subnetwork: got a checkpoint of masking "backward"; takes "forward": there the parts were never models '
            "of their own"
        )
    carve = _carve_units if block["granularity"] == "neuron" else _carve_layers
    return carve(plan, block, config, worker, weights)


def _carve_layers(
    plan: SubnetworkPlan, block: dict[str, Any], config: Any, worker: int, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    if block["granularity"] == "branch":
        raise CheckpointError("--subnetwork: a config has no words for layers that lack a branch")
    if block["output_scaling"] != "none" and plan.coverage != 1.0:
        raise CheckpointError(
            f'--subnetwork: got output_scaling "{block["output_scaling"]}" with whole layers as units; takes "none": '
            "no weight of a layer scales what it adds"
        )
    model = meta_model(config, "meta.json")
    adapter = find_adapter(model)
    names = [layer.name for layer in adapter.layers(model)]
    absent = {p.space.name for p in plan.spaces if not plan.owned(p.space.name, worker)}
    kept = [i for i, name in enumerate(names) if name not in absent]
    fewer = adapter.with_layers(config, kept)
    if fewer is None:
        raise CheckpointError("--subnetwork: a config of this family has no words for fewer layers")
    config.__dict__.update(fewer.__dict__)
    return _renumbered({f"{names[old]}.": f"{names[new]}." for new, old in enumerate(kept)}, names, weights)


def _renumbered(
    prefixes: dict[str, str], layers: Sequence[str], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    every = {f"{name}." for name in layers}
    for name, value in weights:
        prefix = next((prefix for prefix in every if name.startswith(prefix)), None)
        if prefix is None:
            yield name, value
        elif prefix in prefixes:
            yield prefixes[prefix] + name.removeprefix(prefix), value


def _carve_units(
    plan: SubnetworkPlan, block: dict[str, Any], config: Any, worker: int, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    lacking = [size for size in (_WIDTH, _KV_HEADS, _HEADS) if not hasattr(config, size)]
    if lacking:
        raise CheckpointError(
            f"--subnetwork: a config of this family has no words for fewer heads of the same size: "
            f"{type(config).__name__} lacks {', '.join(lacking)}"
        )
    model = meta_model(config, "meta.json")
    adapter = find_adapter(model)
    modules = {m.space.name: m for m in adapter.partitioned_modules(model, tuple(adapter.units))}
    planned = {p.space.name: p.space.num_units for p in plan.spaces}
    other = [name for name, units in planned.items() if name not in modules or modules[name].space.num_units != units]
    if other:
        raise CheckpointError(
            f"checkpoint: the plan is of another model: {other[0]} has {planned[other[0]]} units in it"
        )
    counts: dict[str, set[int]] = {}
    for name, module in modules.items():
        owned = sum(c.stop - c.start for c in plan.owned(name, worker)) if name in planned else module.space.num_units
        counts.setdefault(module.space.kind, set()).add(owned)
    for kind, sizes in counts.items():
        if len(sizes) > 1 or 0 in sizes:
            raise CheckpointError(
                f"--subnetwork: worker {worker} owns {' or '.join(map(str, sorted(sizes)))} units of {kind} by layer; "
                "a config has one size for all layers, above 0"
            )
    groups = next(iter(counts["attention"]))
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    setattr(config, _WIDTH, next(iter(counts["mlp"])))
    setattr(config, _KV_HEADS, groups)
    setattr(config, _HEADS, groups * queries)
    return _sliced(plan, block, worker, [modules[name] for name in modules if name in planned], weights)


def _sliced(
    plan: SubnetworkPlan,
    block: dict[str, Any],
    worker: int,
    modules: list[PartitionedModule],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = {tensor.name: (module, tensor) for module in modules for tensor in module.tensors}
    for name, value in weights:
        if name not in tensors:
            yield name, value
            continue
        module, tensor = tensors[name]
        scale = output_scale(block["output_scaling"], plan, worker, module.space.kind)
        yield name, _slice(value, tensor, plan.owned(module.space.name, worker), scale)


def _slice(value: torch.Tensor, tensor: PartitionedTensor, owned: Any, scale: float) -> torch.Tensor:
    width = tensor.width
    pieces = [value.narrow(tensor.dim, chunk.start * width, (chunk.stop - chunk.start) * width) for chunk in owned]
    return torch.cat(pieces, tensor.dim) * (scale if tensor.is_write else 1.0)
