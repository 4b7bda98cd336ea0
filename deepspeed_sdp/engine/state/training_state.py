"""This rank's part of the training state, as rectangles of the full model's tensors.

Master weights and optimizer state are logical tensors with the full model's shapes, ``master.<parameter>`` and
``optimizer.<state>.<parameter>``, so that no trace of the layout that wrote them is in a checkpoint. What is not
trained is ``model.<parameter or buffer>``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_sdp.checkpoint import Entry, Region, regions_of_range, without_groups
from deepspeed_sdp.engine.comm.agreement import agreed
from deepspeed_sdp.engine.comm.mesh import OwnerGroups, Owners
from deepspeed_sdp.engine.state.copies import copies_of_others
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, Kept
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.subnetwork import Fragment, Subnetwork


class TrainingState:
    """See the module."""

    def __init__(self, subnetwork: Subnetwork, optimizer: SDPOptimizer, groups: OwnerGroups) -> None:
        self._subnetwork = subnetwork
        self._optimizer = optimizer
        self._groups = groups
        self._rank = dist.get_rank()
        self._read: dict[nn.Parameter, dict[str, Any]] = {}
        names = {id(parameter): name for name, parameter in subnetwork.module.named_parameters()}
        self._names = {index: names[id(parameter)] for index, parameter in optimizer.parameters.items()}

    def to_write(self, copies: int = 1) -> list[Entry]:
        """Collective, if ``copies`` is not 1. What this rank writes.

        Args:
            copies: how many owners write each element of a logical tensor, each of them once.
        """
        entries: list[Entry] = []
        for bucket in self._optimizer.masters:
            start, stop = bucket.share_of(self._rank)
            for kind, value in self._optimizer.tensors_of(bucket).items():
                entries += self._of_bucket(bucket, kind, value, self._base(bucket), start, stop)
        entries += self._untrained(is_writing=True)
        for copy in range(1, copies):
            found: list[Entry] = []
            for bucket, (start, stop), values in copies_of_others(
                self._optimizer, self._groups, copy, self._optimizer.tensors_of
            ):
                for kind, value in values.items():
                    found += self._of_bucket(bucket, kind, value, start, start, stop)
            found += self._untrained(is_writing=True, copy=copy)
            entries += [replace(entry, copy=copy) for entry in found]
        return entries

    def to_read(self, state_keys: Sequence[str]) -> list[Entry]:
        """What this rank needs; :meth:`take_state` takes it.

        Args:
            state_keys: tensors of the optimizer's state that there are.
        """
        entries: list[Entry] = []
        self._read = {}
        for bucket, master in self._optimizer.masters.items():
            start = min(bucket.index * bucket.shard_numel, bucket.numel)
            shard = (start, min(start + bucket.shard_numel, bucket.numel))
            base = self._base(bucket)
            entries += self._of_bucket(bucket, "master", master.data, base, *shard)
            for key, kept in self._kept(bucket).items() if state_keys else ():
                if kept.by_element:
                    value = torch.zeros_like(master.data, dtype=kept.dtype)
                    self._read.setdefault(master, {})[key] = value
                    entries += self._of_bucket(bucket, f"optimizer.{key}", value, base, *shard)
        return [*entries, *self._untrained(is_writing=False)]

    def state_keys(self) -> list[str]:
        """Names of the optimizer's state tensors, e.g. ``exp_avg``; none before it has any state."""
        return self._optimizer.behaviour.keys(by_element=True) if any(self._optimizer.state.values()) else []

    def scalars(self) -> list[dict[str, Any]]:
        """Collective. The rest of the optimizer's state, e.g. ``step``, which the parameters of a group share.

        Returns:
            by the client's group, ``{"value": number, "dtype": name or None}`` of every key; the same on all ranks.

        Raises:
            CheckpointError: parameters of a group differ in it; on every rank.
        """
        mine = agreed(self._own_scalars)
        told: list[dict[int, dict[str, Any]]] = gather_objects(mine, "agreeing on what the optimizer counts")
        # A rank may hold nothing of a group.
        found: dict[int, dict[str, Any]] = {group[GROUP_KEY]: {} for group in self._optimizer.param_groups}
        for rank, of_rank in enumerate(told):
            for group, scalars in of_rank.items():
                found[group] = found[group] or scalars
                if found[group] != scalars:
                    raise CheckpointError(
                        f"optimizer: rank {rank} has {scalars} in group {group}, another {found[group]}"
                    )
        return [found[group] for group in sorted(found)]

    def _own_scalars(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for bucket, master in self._optimizer.masters.items():
            state = self._optimizer.state.get(master, {})
            numbers = [key for key, kept in self._kept(bucket).items() if not kept.by_element and key in state]
            scalars = {key: _described(state[key]) for key in numbers}
            first = found.setdefault(bucket.client_group, scalars)
            if first != scalars:
                raise CheckpointError(
                    f"optimizer: parameters of group {bucket.client_group} differ: {first} and {scalars}"
                )
        return found

    def check(self, state_keys: Sequence[str], scalars: Sequence[Mapping[str, Any]]) -> None:
        """Whether what is saved, if anything, is all that the optimizer remembers.

        Raises:
            CheckpointError: something lacks; the same on every rank.
        """
        for group, state in self._optimizer.behaviour.state.items():
            for key, kept in state.items() if state_keys or any(scalars) else ():
                if key not in (state_keys if kept.by_element else scalars[group]):
                    raise CheckpointError(
                        f"checkpoint: lacks {key!r}, which {type(self._optimizer.optimizer).__name__} keeps of each "
                        "parameter (load_optimizer_states=False loads the weights alone)"
                    )

    def take_state(self, scalars: Sequence[Mapping[str, Any]]) -> None:
        """Make what was read, and what :meth:`scalars` returned, the optimizer's state, as that optimizer wants it."""
        self._optimizer.reset_state()
        for bucket, master in self._optimizer.masters.items():
            numbers = {
                key: kept.number(scalars[bucket.client_group][key]["value"])
                for key, kept in self._kept(bucket).items()
                if not kept.by_element and key in scalars[bucket.client_group]
            }
            if state := {**self._read.get(master, {}), **numbers}:
                self._optimizer.optimizer.state[master].update(state)
        self._read = {}

    def _kept(self, bucket: OwnerBucket) -> Mapping[str, Kept]:
        return self._optimizer.behaviour.state[bucket.client_group]

    def spread(self) -> None:
        """Collective. The master weights are new: bring them to all who compute with them."""
        self._optimizer.store_masters()
        self._optimizer.refresh.send_all()

    def _base(self, bucket: OwnerBucket) -> int:
        """Where this rank's shard begins in the bucket's flat vector."""
        return bucket.index * bucket.shard_numel

    def _of_bucket(
        self, bucket: OwnerBucket, prefix: str, values: torch.Tensor, base: int, start: int, stop: int
    ) -> Iterator[Entry]:
        """Elements ``[start, stop)`` of the bucket, out of ``values``, which begin at its element ``base``."""
        first = 0
        for index, begin, end in bucket.ranges:
            name, whole = self._names[index], self._region(self._names[index])
            zero = first - begin  # of the parameter, seen from the bucket's flat vector
            for region, low, high in regions_of_range(whole, max(start - zero, begin), min(stop - zero, end)):
                part = values[zero + low - base : zero + high - base]
                yield from self._entries(prefix, name, region, part.view(region.sizes))
            first += end - begin

    def _region(self, name: str) -> Region:
        """Which rectangle of its full parameter, seen in ``unit_shape``, a parameter of the subnetwork is."""
        fragment: Fragment = self._subnetwork.fragments[name]
        if fragment.dim is None:
            sizes = tuple(self._subnetwork.module.get_parameter(name).shape)
            return Region((0,) * len(sizes), sizes)
        sizes = self._subnetwork.partitioned[fragment.full_name].fragment_shape(fragment)
        return Region(tuple(fragment.start if dim == fragment.dim else 0 for dim in range(len(sizes))), sizes)

    def _entries(self, prefix: str, name: str, region: Region, value: torch.Tensor) -> Iterator[Entry]:
        """``region`` of a parameter of the subnetwork, as rectangles of the full tensor's own shape."""
        fragment: Fragment = self._subnetwork.fragments[name]
        logical = f"{prefix}.{fragment.full_name}"
        full = self._subnetwork.partitioned.get(fragment.full_name)
        if full is None:
            yield Entry(logical, tuple(self._subnetwork.module.get_parameter(name).shape), region, value)
        elif full.groups == 1:
            yield Entry(logical, full.shape, region, value)
        else:
            for of_group, place in without_groups(region, full.dim, full.unit_shape[full.unit_dim]):
                yield Entry(logical, full.shape, of_group, value.select(full.dim, place))

    def _untrained(self, is_writing: bool, copy: int = 0) -> Iterator[Entry]:
        subnetwork = self._subnetwork
        for name, parameter in subnetwork.module.named_parameters():
            fragment = subnetwork.fragments[name]
            if name in subnetwork.views or subnetwork.is_trained(fragment.full_name):
                continue
            if not is_writing or self._writer(self._groups.owners(fragment.owner_set), copy) == self._rank:
                region = self._region(name)
                yield from self._entries("model", name, region, parameter.data.view(region.sizes))
        for name, buffer in subnetwork.persistent_buffers():
            if not is_writing or self._writer(self._groups.for_weights, copy) == self._rank:
                region = Region((0,) * buffer.dim(), tuple(buffer.shape))
                yield Entry(f"model.{name}", tuple(buffer.shape), region, buffer)

    def _writer(self, owners: Owners, copy: int) -> int:
        return owners.next_owner(owners.ranks[0], copy)


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return {"value": value, "dtype": None}
