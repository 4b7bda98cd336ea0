"""What ranks tell each other beside the training: on a process group of this package's own, on the CPU.

The default process group is the user's, who may use it at any time, inside a backward pass too. Nothing of this package
runs on it.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import split_group

from deepspeed_sdp.waits import time_limit, waiting

# By default process group: a job that destroys it and starts another has another one.
_control: "WeakKeyDictionary[ProcessGroup, ProcessGroup]" = WeakKeyDictionary()


def new_group(ranks: Sequence[int], purpose: str, backend: str | None = None) -> ProcessGroup:
    """Collective over the world. A process group with the job's time limit; torch names it by its ``purpose``."""
    with waiting(f"making the process group for {purpose}", range(dist.get_world_size())):
        group: ProcessGroup = dist.new_group(list(ranks), time_limit(), backend, group_desc=f"deepspeed_sdp: {purpose}")
    return group


def new_groups(family: Sequence[Sequence[int]], purpose: str) -> ProcessGroup | None:
    """Collective over the world. Disjoint process groups, of which this rank gets its own, if any.

    One by one they cost those outside nothing, but on NCCL where the world's communicator exists from the start
    (DeepSpeed binds its device): there every group is a split of that, in which all ranks take part. So it is one split
    for all of them, as torch's ``DeviceMesh`` has it.
    """
    world: Any = dist.group.WORLD
    bound = world.bound_device_id
    if len(family) > 1 and bound is not None and world._get_backend(bound).supports_splitting:
        with waiting(f"making the process groups for {purpose}", range(dist.get_world_size())):
            return split_group(
                split_ranks=[list(ranks) for ranks in family],
                timeout=time_limit(),
                group_desc=f"deepspeed_sdp: {purpose}",
            )
    made = [new_group(ranks, purpose) for ranks in family]
    return next((group for group, ranks in zip(made, family, strict=True) if dist.get_rank() in ranks), None)


def control_group() -> ProcessGroup:
    """Collective at its first call. The package's own group of all ranks, which works on the CPU."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _control:
        _control[world] = cpu_group("control")
    return _control[world]


def cpu_group(purpose: str) -> ProcessGroup:
    """Collective. A new group of all ranks that works on the CPU."""
    # A simulated world (torch's fake backend) has no connections.
    backend = None if dist.get_backend() == "fake" else "gloo"
    return new_group(range(dist.get_world_size()), purpose, backend)


def gather_objects(value: Any, what: str, group: ProcessGroup | None = None) -> list[Any]:
    """Collective. ``value`` of every rank, on every rank.

    Args:
        what: what it is for, in words: who waits too long says so.
        group: of all ranks; default: :func:`control_group`. A thread beside the training has its own.
    """
    values: list[Any] = [None] * dist.get_world_size()
    with waiting(what, range(len(values))):
        dist.all_gather_object(values, value, group=group or control_group())
    return values


def object_of(rank: int, value: Any, what: str, group: ProcessGroup | None = None) -> Any:
    """Collective. ``value`` of ``rank``, on every rank."""
    told = [value]
    with waiting(what, range(dist.get_world_size())):
        dist.broadcast_object_list(told, src=rank, group=group or control_group())
    return told[0]


def object_of_first(value: Any, what: str) -> Any:
    """Collective. ``value`` of rank 0, on every rank."""
    return object_of(0, value, what)


def reduce_numbers(
    numbers: torch.Tensor, what: str, op: Any = dist.ReduceOp.SUM, group: ProcessGroup | None = None
) -> torch.Tensor:
    """Collective. ``numbers`` of all ranks put together, on the CPU; on a device the host waits for them."""
    total = numbers.detach().to("cpu", copy=True)
    with waiting(what, range(dist.get_world_size())):
        dist.all_reduce(total, op=op, group=group or control_group())
    return total


def meet(what: str, group: ProcessGroup | None = None) -> None:
    """Collective. Wait for all ranks."""
    with waiting(what, range(dist.get_world_size())):
        dist.barrier(group=group or control_group())
