"""Bytes that a rank sends: counted at every collective, and read from its network interface where it has one.

Every collective of torch passes its dispatcher (DDP's and FSDP2's from C++ too), where its tensors and process group
are seen. Counted is what a ring (or a pairwise exchange) of the backend sends for it; gloo makes a reduce-scatter from
an all-reduce, and is counted so.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INTERFACE = "SYSTEMS_INTERFACE"


def interface_bytes() -> int | None:
    """Bytes sent so far over this rank's own interface, headers too; ``None`` where ranks share one or are faked."""
    name = os.environ.get(INTERFACE)
    if not name or dist.get_backend() == "fake":
        return None
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        device, _, figures = line.partition(":")
        if device.strip() == name:
            # Eight figures of what was received stand first.
            return int(figures.split()[8])
    return None


class Collectives(TorchDispatchMode):
    """Counts inside: ``sent``, bytes by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            self._count(name.split(".")[0].strip("_"), (args, kwargs))
        elif namespace == "_c10d_functional":
            self._count_functional(name.split(".")[0].strip("_"), args)
        return func(*args, **kwargs)

    def _count(self, name: str, arguments: Any) -> None:
        leaves = tree_leaves(arguments)
        group = next((g for g in map(_process_group, leaves) if g is not None), None)
        if group is None or group.size() < 2:
            return
        if name == "alltoall_base":
            sent = _exchanged(*arguments[0], group)
        else:
            tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
            sent = _sent(name, [tensor.numel() * tensor.element_size() for tensor in tensors], group)
        if sent is None:
            raise NotImplementedError(f"a collective that is not counted: c10d::{name}")
        self.sent[name] += sent

    def _count_functional(self, name: str, args: Any) -> None:
        if name == "wait_tensor":
            return
        if name not in _FUNCTIONAL:
            raise NotImplementedError(f"a collective that is not counted: _c10d_functional::{name}")
        kind, output = _FUNCTIONAL[name]
        group = _process_group(args[-1]) or dist.distributed_c10d._resolve_process_group(args[-1])
        nbytes = args[0].numel() * args[0].element_size()
        sizes = [nbytes] if output is None else [nbytes, int(output(group.size()) * nbytes)]
        self.sent[kind] += _sent(kind, sizes, group) or 0


# Functional collectives (of tensors that are sharded themselves) by their other names, and outputs over inputs.
_FUNCTIONAL = {
    "all_reduce": ("allreduce", None),
    "all_gather_into_tensor": ("allgather_base", lambda ranks: ranks),
    "reduce_scatter_tensor": ("reduce_scatter_base", lambda ranks: 1 / ranks),
}


def _sent(name: str, sizes: list[int], group: Any) -> int | None:
    """Bytes one rank sends on average; ``None`` for a collective that is not known here."""
    ranks = group.size()
    around = (ranks - 1) / ranks
    if name in ("barrier", "monitored_barrier", "send", "recv", "recv_any_source"):
        return sum(sizes) if name == "send" else 0
    if name.startswith("allreduce"):
        return int(2 * around * sum(sizes))
    if "allgather" in name:
        # Outputs and inputs: n parts and one.
        return int(around * sum(sizes) * ranks / (ranks + 1))
    if "reduce_scatter" in name:
        factor = 2 if "gloo" in dist.get_backend(group) else 1
        return int(factor * around * sum(sizes) * ranks / (ranks + 1))
    if name.startswith("alltoall"):
        # Outputs and inputs; a rank keeps its own part.
        return int(around * sum(sizes) / 2)
    if name.startswith(("broadcast", "reduce", "gather", "scatter")):
        return int(around * sum(sizes))
    return None


def _exchanged(output: torch.Tensor, sent: torch.Tensor, _: Any, output_splits: Any, splits: Any, *rest: Any) -> int:
    """Bytes of an all-to-all with uneven parts: all but the rank's own."""
    group = rest[-1]
    rows = sent.size(0) if sent.dim() else 0
    kept = splits[group.rank()] if splits else rows // group.size()
    return (rows - kept) * (sent.numel() // rows if rows else 0) * sent.element_size()


def _process_group(leaf: Any) -> Any:
    if isinstance(leaf, dist.ProcessGroup):
        return leaf
    if isinstance(leaf, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(leaf)
        except (RuntimeError, TypeError):
            return None
    return None
