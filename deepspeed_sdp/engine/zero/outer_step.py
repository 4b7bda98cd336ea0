"""Local steps: workers train apart for some steps, then those who own a unit agree on it.

They average what has become of its master weights, or take the average for the gradient of an outer optimizer with
Nesterov's momentum (DiLoCo, arXiv 2311.08105), whose state is sharded over them. Moments of the inner optimizer stay
where they are, or are averaged too. docs/schedules.md has the formulas.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from deepspeed_sdp.config import OuterOptimizer
from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.engine.comm.stages import Arriving, Flow, Pending, Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch, TimedWork, named
from deepspeed_sdp.engine.comm.traffic import Traffic, all_gather_bytes
from deepspeed_sdp.engine.comm.transport import gather_inside, start_scatter
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.plan.segmentation import shard_numel

KIND = "outer_average"


class OuterStep:
    """Of one rank.

    Args:
        optimizer: the inner one, whose master weights are averaged.
        outer: what is done with the average; ``None``: it is taken as it is.
        with_moments: whether the inner optimizer's state is averaged too.
        stages, traffic, stopwatch: of the job's collectives.

    Attributes:
        momentum: of the outer optimizer, fp32 ``[slice]``, by bucket; each owner has a slice of its own.
    """

    def __init__(
        self,
        optimizer: SDPOptimizer,
        outer: OuterOptimizer | None,
        with_moments: bool,
        stages: Stages,
        traffic: Traffic,
        stopwatch: Stopwatch,
    ) -> None:
        self._optimizer = optimizer
        self._outer = outer
        self._with_moments = with_moments
        self._stages = stages
        self._traffic = traffic
        self._stopwatch = stopwatch
        self._anchors: dict[OwnerBucket, torch.Tensor] = {}
        self.momentum: dict[OwnerBucket, torch.Tensor] = {}
        # With a delay: what is under way, then by bucket what it adds to the master weights.
        self._under_way: list[tuple[list[OwnerBucket], list[torch.Tensor], Pending]] = []
        self._changes: dict[OwnerBucket, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """The master weights are what owners have agreed on. The outer optimizer, if any, begins anew."""
        self._under_way, self._changes = [], {}
        if self._outer is not None:
            self._anchors = {b: self._own_slice(b, self._padded(b)).clone() for b in self._optimizer.masters}
            self.momentum = {b: torch.zeros_like(anchor) for b, anchor in self._anchors.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Collective. Agree on what has become of the weights, and bring it to all who compute with them."""
        self._agree()

    @torch.no_grad()
    def issue(self) -> None:
        """Collective. Begin to agree on the weights of now; :meth:`apply` ends it, some steps of training later."""
        self._optimizer.refresh.settle()
        for buckets in self._portions():
            flats = [self._padded(bucket) for bucket in buckets]
            flows = [self._average(bucket, flat.clone()) for bucket, flat in zip(buckets, flats, strict=True)]
            self._under_way.append((buckets, flats, self._stages.start(flows, can_wait=True)))

    @torch.no_grad()
    def apply(self) -> None:
        """Collective. Add to the weights what the agreement changes in those of :meth:`issue`."""
        self._arrive()
        for bucket, change in self._changes.items():
            master = self._optimizer.masters[bucket]
            master.add_(change.to(master.device))
        self._changes = {}
        self._optimizer.spread()

    def _arrive(self) -> None:
        """Collective, while something is under way."""
        for buckets, flats, pending in self._under_way:
            for bucket, flat, whole in zip(buckets, flats, self._agreed(buckets, pending), strict=True):
                self._changes[bucket] = (whole - flat)[: self._optimizer.masters[bucket].numel()]
        self._under_way = []

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective. Inside, weights are the owners' averages; afterwards they are again what they were."""
        kept = {bucket: master.data.clone() for bucket, master in self._optimizer.masters.items()}
        with torch.no_grad():
            self._agree(is_lasting=False)
        try:
            yield
        finally:
            with torch.no_grad():
                for bucket, master in self._optimizer.masters.items():
                    master.copy_(kept[bucket])
            self._optimizer.spread()

    @named("outer step")
    def _agree(self, is_lasting: bool = True) -> None:
        """``is_lasting``: by the outer optimizer, if there is one."""
        self._optimizer.refresh.settle()
        for buckets in self._portions(is_lasting):
            flows = [self._average(bucket, self._padded(bucket)) for bucket in buckets]
            for bucket, whole in zip(
                buckets, self._agreed(buckets, self._stages.start(flows), is_lasting), strict=True
            ):
                master = self._optimizer.masters[bucket]
                master.copy_(whole[: master.numel()])
        if is_lasting and self._with_moments:
            self._average_moments()
        self._optimizer.spread()

    def _average_moments(self) -> None:
        for buckets in self._portions(is_lasting=False):
            held = [(bucket, value) for bucket in buckets for value in self._moments(bucket)]
            averages = self._stages.start([self._average(b, self._padded(b, value)) for b, value in held]).finish()
            flows = [self._gather(bucket, part) for (bucket, _), part in zip(held, averages, strict=True)]
            for (_, value), whole in zip(held, self._stages.start(flows).finish(), strict=True):
                value.copy_(whole[: value.numel()])

    def _moments(self, bucket: OwnerBucket) -> Iterator[torch.Tensor]:
        """As many on all owners: of one that has passed over every step so far they are zeros, which go nowhere."""
        found, master = self._optimizer.tensors_of(bucket), self._optimizer.masters[bucket].data
        for key, kept in sorted(self._optimizer.behaviour.state[bucket.client_group].items()):
            if kept.by_element:
                value = found.get(f"optimizer.{key}")
                yield torch.zeros_like(master) if value is None else value

    def _portions(self, is_lasting: bool = True) -> Iterator[list[OwnerBucket]]:
        """A portion at a time, the buckets on which there is something to agree: not where one owns them alone."""
        is_updated = is_lasting and self._outer is not None
        for portion in self._optimizer.refresh.portions:
            owned = (bucket for of_round in portion.owned for bucket in of_round)
            yield [bucket for bucket in owned if is_updated or bucket.owners.outer is not None]

    def _agreed(
        self, buckets: Sequence[OwnerBucket], averages: Pending, is_lasting: bool = True
    ) -> Iterator[torch.Tensor]:
        """Collective. What becomes of the shards ``[shard_numel]``, and perhaps some padding."""
        slices = averages.finish()
        if is_lasting and self._outer is not None:
            slices = [self._updated(bucket, average) for bucket, average in zip(buckets, slices, strict=True)]
        flows = [self._gather(bucket, of_bucket) for bucket, of_bucket in zip(buckets, slices, strict=True)]
        yield from self._stages.start(flows).finish()

    def _updated(self, bucket: OwnerBucket, average: torch.Tensor) -> torch.Tensor:
        """What an SGD with momentum makes of a slice, whose gradient is its change."""
        outer, anchor, momentum = self._outer, self._anchors[bucket], self.momentum[bucket]
        assert outer is not None
        gradient = anchor - average.to(anchor.device)
        momentum.mul_(outer.momentum).add_(gradient)
        step = gradient.add_(momentum, alpha=outer.momentum) if outer.nesterov else momentum
        return anchor.sub_(step, alpha=outer.lr).to(average.device)

    # -- slices of a bucket ------------------------------------------------------------------------------------------

    def _levels(self, bucket: OwnerBucket) -> Sequence[Group]:
        """Over whom a rank's shard is averaged: the owners at its coordinate. Where replicas hold the same, they too,
        so that each averages a slice of it.
        """
        owners = bucket.owners
        if owners.outer is None:
            return ()
        return owners.levels if self._optimizer.stage == 0 else (owners.outer,)

    def _padded(self, bucket: OwnerBucket, value: torch.Tensor | None = None) -> torch.Tensor:
        """The shard of master weights, or another ``value`` of it, fp32 on the device of the collectives, with zeros
        up to slices of one size.
        """
        value = self._optimizer.masters[bucket].data if value is None else value
        ranks = math.prod(len(group.ranks) for group in self._levels(bucket))
        flat = torch.zeros(ranks * shard_numel(value.numel(), ranks), device=self._optimizer.device)
        flat[: value.numel()] = value
        return flat

    def _own_slice(self, bucket: OwnerBucket, flat: torch.Tensor) -> torch.Tensor:
        for group in self._levels(bucket):
            flat = flat.view(len(group.ranks), -1)[group.place]
        return flat

    def _average(self, bucket: OwnerBucket, flat: torch.Tensor) -> Flow:
        """This rank's slice of the owners' average, summed in fp32 and in the order of the ranks; takes ``flat``."""
        levels = self._levels(bucket)
        for group in levels:
            self._count(flat.nbytes, group, bucket)
            work, take = start_scatter(flat, group)
            yield self._timed(work, group)
            flat = take()
        flat.div_(math.prod(len(group.ranks) for group in levels))
        return Arriving([], lambda: [flat])

    def _gather(self, bucket: OwnerBucket, part: torch.Tensor) -> Flow:
        levels = self._levels(bucket)
        nbytes = part.nbytes
        for group in reversed(levels):
            nbytes *= len(group.ranks)
            self._count(nbytes, group, bucket)
        return (yield from gather_inside(part, levels, self._timed)) if levels else Arriving([], lambda: [part])

    def _timed(self, work: object, group: Group) -> TimedWork:
        return self._stopwatch.timed(work, "agreeing on weights", group)

    def _count(self, nbytes: int, group: Group, bucket: OwnerBucket) -> None:
        self._traffic.add(KIND, all_gather_bytes(nbytes, len(group.ranks)), bucket.owner_set)

    def tensors(self) -> list[torch.Tensor]:
        """What lives between steps beside the inner optimizer's state."""
        under_way = [flat for _, flats, _ in self._under_way for flat in flats]
        return [*self._anchors.values(), *self.momentum.values(), *self._changes.values(), *under_way]

    # -- for checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Collective, while something is under way. What is remembered of every bucket."""
        self._arrive()
        of_kinds = {"anchor": self._anchors, "momentum": self.momentum, "change": self._changes}
        return [
            {kind: of_kind[bucket] for kind, of_kind in of_kinds.items() if bucket in of_kind}
            for bucket in self._optimizer.masters
        ]

    @torch.no_grad()
    def take(self, state: Sequence[dict[str, torch.Tensor]]) -> None:
        """Go on from what :meth:`state` gave in the same layout; an outer optimizer that was not there begins anew."""
        for bucket, saved in zip(self._optimizer.masters, state, strict=True):
            if self._outer is not None and "anchor" in saved:
                self._anchors[bucket].copy_(saved["anchor"])
                self.momentum[bucket].copy_(saved["momentum"])
            if "change" in saved:
                self._changes[bucket] = saved["change"]
