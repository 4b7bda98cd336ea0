"""This rank's part of the training state, as runs of the full model's tensors.

Master weights and optimizer state are logical tensors with the full model's shapes, ``master.<parameter>`` and
``optimizer.<state>.<parameter>``. What is not trained is ``model.<parameter or buffer>``. A bucket's flat vector is
written as it lies in memory; what it is of the full model is said beside it, so that any other layout can read it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.checkpoint import Entry, Held, Layout, Run, Section, Writers, cut, whole
from deepspeed_sdp.engine.comm.mesh import OwnerGroups, Owners
from deepspeed_sdp.engine.state.copies import exchange_copies
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, Kept
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.subnetwork import Fragment, Subnetwork


class TrainingState:
    """See the module.

    Attributes:
        has_state: whether the optimizer has stepped, on any rank; known after :meth:`scalars`.
    """

    def __init__(self, subnetwork: Subnetwork, optimizer: SDPOptimizer, groups: OwnerGroups) -> None:
        self.has_state = False
        self._subnetwork = subnetwork
        self._optimizer = optimizer
        self._groups = groups
        self._rank = dist.get_rank()
        # Of what others write an owner has values of its own.
        self._is_whole = optimizer.stage == 0 or optimizer.is_apart
        self._read: dict[nn.Parameter, dict[str, Any]] = {}
        names = {id(parameter): name for name, parameter in subnetwork.module.named_parameters()}
        self._names = {index: names[id(parameter)] for index, parameter in optimizer.parameters.items()}

    # -- writing -----------------------------------------------------------------------------------------------------

    def layout(self, copies: int = 1) -> Layout:
        """Where everything lies in the files of this rank's worker.

        A section per group of the client, with its buckets in the order of :meth:`_buckets`; then one per tensor that
        is not trained.

        Args:
            copies: how many owners write each element, each of them once.
        """
        writers: dict[Writers, int] = {}

        def number(owners: Owners, ranks: Sequence[int]) -> int:
            of_copies = (tuple(owners.next_owner(rank, copy) for rank in ranks) for copy in range(copies))
            return writers.setdefault(tuple(of_copies), len(writers))

        of_set: dict[int, int] = {}
        sections = []
        for group, kinds in self._kinds().items():
            held = []
            for bucket in self._buckets(group):
                if bucket.owner_set not in of_set:
                    of_set[bucket.owner_set] = number(bucket.owners, bucket.owners.ranks)
                share = bucket.share_of(bucket.owners.ranks[0])[1]
                held.append(Held(of_set[bucket.owner_set], tuple(self._runs(bucket)), share))
            sections.append(Section(kinds, held))
        for _, run, value, owners in self._untrained():
            held = [Held(number(owners, owners.ranks[:1]), (run,), run.numel)]
            sections.append(Section({"model": value.dtype}, held))
        return Layout(list(writers), sections)

    def values(self, copies: int) -> Iterator[torch.Tensor]:
        """Collective, if ``copies`` is not 1. What this rank writes, in the order of :meth:`Layout.tensors`."""
        for copy in range(copies):
            for group, kinds in self._kinds().items():
                for kind in kinds:
                    for portion in self._portions(group):
                        own = [self._tensor(bucket, kind, kinds[kind]) for bucket in portion]
                        if copy == 0 or self._is_whole:
                            source = [b.owners.next_owner(self._rank, -copy) for b in portion]
                            for bucket, value, rank in zip(portion, own, source, strict=True):
                                first = self._shard(bucket)[0]
                                start, stop = bucket.share_of(rank)
                                yield value[start - first : stop - first]
                        else:
                            yield from exchange_copies(self._groups, self._optimizer.device, portion, own, copy)
            for _, _, value, owners in self._untrained():
                if owners.next_owner(owners.ranks[0], copy) == self._rank:
                    yield value

    def held(self) -> Iterator[dict[str, torch.Tensor]]:
        """What this rank holds of every bucket of :meth:`layout`, in its order, by kind: of what is trained its shard
        (at ZeRO 0 the whole bucket), of the rest everything. Views where they are parts of weights.
        """
        for group, kinds in self._kinds().items():
            for bucket in self._buckets(group):
                yield {kind: self._tensor(bucket, kind, dtype) for kind, dtype in kinds.items()}
        for _, _, value, _ in self._untrained():
            yield {"model": value}

    def _kinds(self) -> dict[int, dict[str, torch.dtype]]:
        """What is kept of the buckets of each of the client's groups; the same on all ranks."""
        return {
            group: {
                "master": torch.float32,
                **{
                    f"optimizer.{key}": kept.dtype
                    for key, kept in sorted(self._optimizer.behaviour.state[group].items())
                    if kept.by_element and kept.dtype is not None and self.has_state
                },
            }
            for group in sorted(self._optimizer.behaviour.state)
        }

    def _portions(self, group: int) -> Iterator[list[OwnerBucket]]:
        """This rank's buckets of one of the client's groups, a portion of the model at a time; as many on all ranks."""
        for portion in self._optimizer.refresh.portions:
            yield [bucket for buckets in portion.owned for bucket in buckets if bucket.client_group == group]

    def _buckets(self, group: int) -> Iterator[OwnerBucket]:
        return (bucket for portion in self._portions(group) for bucket in portion)

    def _tensor(self, bucket: OwnerBucket, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """One kind of what is kept of this rank's shard ``[shard_numel]``."""
        master = self._optimizer.masters[bucket].data
        found = self._optimizer.tensors_of(bucket).get(kind)
        return torch.zeros_like(master, dtype=dtype) if found is None else found.to(dtype)

    # -- reading -----------------------------------------------------------------------------------------------------

    def to_read(self, state_keys: Sequence[str]) -> list[Entry]:
        """What this rank needs; :meth:`take_state` takes it.

        Args:
            state_keys: tensors of the optimizer's state that there are.
        """
        entries: list[Entry] = []
        self._read = {}
        for bucket, master in self._optimizer.masters.items():
            start, stop = self._shard(bucket)
            runs = tuple(cut(self._runs(bucket), start, stop))
            entries.append(Entry("master", runs, master.data))
            for key, kept in self._kept(bucket).items() if state_keys else ():
                if kept.by_element:
                    value = torch.zeros_like(master.data, dtype=kept.dtype)
                    self._read.setdefault(master, {})[key] = value
                    entries.append(Entry(f"optimizer.{key}", runs, value))
        return [
            *entries,
            *(Entry("model", (run,), value) for _, run, value, _ in untrained_of(self._subnetwork, self._groups)),
        ]

    def state_keys(self) -> list[str]:
        """Names of the optimizer's state tensors, e.g. ``exp_avg``; none before it has any state."""
        return self._optimizer.behaviour.keys(by_element=True) if self.has_state else []

    def scalars(self) -> list[dict[str, Any]]:
        """Collective. The rest of the optimizer's state, e.g. ``step``, which the parameters of a group share.

        Returns:
            by the client's group, ``{"value": number, "dtype": name or None}`` of every key; the same on all ranks.

        Raises:
            CheckpointError: parameters of a group differ in it; on every rank. Of workers that train apart the first
                one's are taken.
        """
        mine = agreed(self._own_scalars)
        outcomes = gather_objects((any(self._optimizer.state.values()), mine), "agreeing on what the optimizer counts")
        self.has_state = any(has_state for has_state, _ in outcomes)
        # A rank may hold nothing of a group.
        found: dict[int, dict[str, Any]] = {group[GROUP_KEY]: {} for group in self._optimizer.param_groups}
        for rank, (_, of_rank) in enumerate(outcomes):
            for group, scalars in of_rank.items():
                found[group] = found[group] or scalars
                # Workers that train apart may have passed over other steps.
                if found[group] != scalars and not self._optimizer.is_apart:
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

    # -- where things lie --------------------------------------------------------------------------------------------

    def _shard(self, bucket: OwnerBucket) -> tuple[int, int]:
        return shard_of(bucket, self._rank)

    def _runs(self, bucket: OwnerBucket) -> Iterator[Run]:
        """The bucket's flat vector."""
        for index, start, stop in bucket.ranges:
            yield replace(run_of(self._subnetwork, self._names[index]), start=start, stop=stop)

    def _untrained(self) -> Iterator[tuple[str, Run, torch.Tensor, Owners]]:
        return untrained_of(self._subnetwork, self._groups)


def untrained_of(subnetwork: Subnetwork, groups: OwnerGroups) -> Iterator[tuple[str, Run, torch.Tensor, Owners]]:
    """What a rank holds and nobody trains: its name here, what it is, its elements, and who owns it."""
    for name, parameter in subnetwork.module.named_parameters():
        fragment = subnetwork.fragments[name]
        if name not in subnetwork.views and not subnetwork.is_trained(fragment.full_name):
            yield name, run_of(subnetwork, name), _flat(parameter), groups.owners(fragment.owner_set)
    for name, buffer in subnetwork.persistent_buffers():
        if buffer.numel():
            yield name, whole(name, buffer.shape), _flat(buffer), groups.for_weights


def shard_of(bucket: BucketShape, rank: int) -> tuple[int, int]:
    """The half-open range of the bucket's flat vector of which owner ``rank`` has the master weights."""
    if bucket.shards == 1:
        return 0, bucket.numel
    if bucket.owners.sharers is bucket.owners:
        return bucket.share_of(rank)
    start = bucket.owners.sharers.index(rank) * bucket.shard_numel
    return min(start, bucket.numel), min(start + bucket.shard_numel, bucket.numel)


def run_of(subnetwork: Subnetwork, name: str) -> Run:
    """What of its full parameter the parameter ``name`` of a subnetwork is."""
    fragment: Fragment = subnetwork.fragments[name]
    full = subnetwork.partitioned.get(fragment.full_name)
    if full is None:
        return whole(fragment.full_name, subnetwork.module.get_parameter(name).shape)
    if fragment.dim is None:
        return whole(fragment.full_name, full.shape)
    rows, inner = math.prod(full.unit_shape[: fragment.dim]), math.prod(full.unit_shape[fragment.dim + 1 :])
    width = (fragment.stop - fragment.start) * inner
    return Run(full.name, full.shape, rows, fragment.start * inner, width, 0, rows * width)


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return {"value": value, "dtype": None}


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of ``tensor``, whose memory is put in order for that."""
    tensor.data = tensor.data.contiguous()
    return tensor.data.view(-1)
