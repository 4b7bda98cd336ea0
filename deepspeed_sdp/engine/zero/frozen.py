"""Parameters that the client freezes and unfreezes in mid-run, by ``requires_grad``.

A step passes over them, as it does where every parameter is stepped by itself: weights and state stay what they are.
Only the count of steps, which all parameters of a bucket share, goes on.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.ranks import gather_objects


class FrozenParameters:
    """Knows which parameters a step passes over.

    One that got a gradient before it was frozen is stepped once more.

    Args:
        buckets: this rank's.
        parameters: of the buckets, by their index there.
        names: full-model name of each of them.
        outside: parameters in no bucket, frozen from the start, by full-model name.
        copies: parameters that others train, or that only views are trained of; frozen whatever the client says.
        is_apart: whether each worker's step is its own: others are not asked.
    """

    def __init__(
        self,
        buckets: Sequence[OwnerBucket],
        parameters: Mapping[int, nn.Parameter],
        names: Sequence[str],
        outside: Mapping[str, nn.Parameter],
        copies: Sequence[nn.Parameter],
        is_apart: bool,
    ) -> None:
        self._is_apart = is_apart
        self._buckets = tuple(buckets)
        self._parameters = parameters
        self._names = names
        self._outside = dict(outside)
        self._copies = tuple(copies)
        self._now = self._passed_over = frozenset[int]()

    def have_changed(self, reached: Set[int]) -> bool:
        """Whether ranks must agree again, as this one freezes other parameters than in the last step.

        Args:
            reached: parameters that got a gradient.
        """
        for parameter in self._copies:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._now = frozenset(i for i, p in self._parameters.items() if not p.requires_grad and i not in reached)
        return self._now != self._passed_over or any(p.requires_grad for p in self._outside.values())

    def agree(self) -> None:
        """Collective. Pass over what is frozen now.

        Raises:
            ConfigError: ranks differ, or train what was frozen from the start; on every rank.
        """
        held = {
            (bucket.key, place): (self._names[index], index in self._now)
            for bucket in self._buckets
            for place, index in enumerate(bucket.items)
        }
        thawed = [name for name, parameter in self._outside.items() if parameter.requires_grad]
        told = {dist.get_rank(): (held, thawed)}
        if not self._is_apart:
            told = dict(enumerate(gather_objects((held, thawed), "agreeing on frozen parameters")))
        first: dict[Any, tuple[int, bool]] = {}
        for rank, (of_rank, outside) in told.items():
            if outside:
                raise ConfigError(
                    f"requires_grad: rank {rank} has true for {outside[0]}, which was frozen when initialize() was "
                    "called and has no place in the optimizer; takes parameters that required gradients then"
                )
            for key, (name, is_frozen) in of_rank.items():
                before, expected = first.setdefault(key, (rank, is_frozen))
                if is_frozen != expected:
                    raise ConfigError(
                        f"requires_grad: {name} is {_word(expected)} on rank {before} and {_word(is_frozen)} on rank "
                        f"{rank}; takes the same on all ranks"
                    )
        self._passed_over = self._now

    @contextmanager
    def kept(self, buckets: Sequence[OwnerBucket], tensors_of: Any) -> Iterator[None]:
        """What is passed over of ``buckets`` is afterwards as before.

        Args:
            tensors_of: weights and state ``[shard_numel]`` of a bucket, by name; those that did not exist before stay.
        """
        saved = [
            (bucket, low, high, {key: value[low:high].clone() for key, value in tensors_of(bucket).items()})
            for bucket in (buckets if self._passed_over else ())
            for low, high in self._ranges(bucket)
        ]
        yield
        for bucket, low, high, values in saved:
            tensors: Mapping[str, torch.Tensor] = tensors_of(bucket)
            for key, value in values.items():
                tensors[key][low:high] = value

    def _ranges(self, bucket: OwnerBucket) -> Iterator[tuple[int, int]]:
        """In this rank's shard."""
        low = -bucket.index * bucket.shard_numel
        for index, start, stop in bucket.ranges:
            high = low + stop - start
            if index in self._passed_over and max(low, 0) < min(high, bucket.shard_numel):
                yield max(low, 0), min(high, bucket.shard_numel)
            low = high


def _word(is_frozen: bool) -> str:
    return "frozen" if is_frozen else "trained"
