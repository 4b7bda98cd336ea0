"""The engine's own buckets, rounds, portions and parts of one rank, without weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepspeed_sdp.engine.comm.mesh import Mesh, Owners
from deepspeed_sdp.engine.zero.bucket_shape import BucketShape
from deepspeed_sdp.engine.zero.refresh import RefreshRules
from deepspeed_sdp.engine.zero.rounds import Portion, Rounds, Use, by_round, rounds_of
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.worker_model import WorkerModel
from deepspeed_sdp.plan import SubnetworkPlan, place_workers
from deepspeed_sdp.plan.segmentation import Bucket, Item
from deepspeed_sdp.subnetwork import SHARED


@dataclass(frozen=True)
class Layout(Rounds[BucketShape]):
    """What a rank holds, and how it is stepped and sent.

    Attributes:
        everyone: all ranks, as this one sees them.
        levels: of the replicas of a worker.
        uses: what uses the weights of every part.
        rules: of what travels after a step.
        step: the portions, in their order.
        agreement: where workers train apart, the portions in which owners agree on weights.
    """

    everyone: Owners
    levels: tuple[int, ...]
    uses: tuple[Use, ...]
    rules: RefreshRules
    step: tuple[Portion[BucketShape], ...]
    agreement: tuple[Portion[BucketShape], ...]

    @property
    def shard_numel(self) -> int:
        """Elements of this rank's shards."""
        return sum(bucket.shard_numel for bucket in self.buckets)


@dataclass(frozen=True)
class Standing:
    """Where the first rank that trains a subnetwork stands among the others.

    Attributes:
        worker: the subnetwork.
        owners: by owner set.
        levels: of the replicas of a worker.
        communicators: that it is in, beside the default one.
    """

    worker: int
    owners: tuple[Owners, ...]
    levels: tuple[int, ...]
    communicators: int

    @classmethod
    def of(cls, plan: SubnetworkPlan, job: Job, ranks_per_node: int, worker: int) -> "Standing":
        """Of subnetwork ``worker`` in ``job`` under ``plan``."""
        assert job.sdp is not None
        workers = place_workers(plan, job.world_size, ranks_per_node, job.sdp.plan.rank_order)
        mesh = Mesh(plan.owner_sets, workers, ranks_per_node)
        rank = workers.index(worker)
        owners = [
            Owners(mesh.ranks(owner_set), rank, mesh.replicas, mesh.replica(rank))
            for owner_set in range(len(plan.owner_sets))
        ]
        if job.sdp.schedule.is_apart:
            owners = [of_set.apart() for of_set in owners]
        return cls(worker, tuple(owners), mesh.levels, len(mesh.groups_of(rank)))


def make_layout(model: WorkerModel, plan: SubnetworkPlan, job: Job, standing: Standing) -> Layout:
    """Of a rank whose model is ``model``."""
    assert job.sdp is not None
    segmentation = rounds_of(model.numels, model.first_places, job.stage, job.round_numel, job.world_size)

    def make(pieces: Sequence[Bucket], of: Owners) -> list[BucketShape]:
        return [BucketShape(bucket, of, job.stage > 0) for bucket in pieces]

    trained = [
        Item((weight.place, weight.start), weight.owner_set, 0, weight.numel, index, weight.in_place)
        for index, weight in enumerate(model.trained)
    ]
    copies = list(_copies(model, plan, standing.worker)) if job.sdp.masking == "backward" else []
    of_rank = Rounds(
        by_round(segmentation, trained, standing.owners, make),
        by_round(segmentation, copies, standing.owners, make),
        model.first_places,
        segmentation,
    )
    numel = sum(bucket.shard_numel for bucket in of_rank.buckets)
    is_exchanged = job.sdp.masking == "backward" and not job.sdp.schedule.is_apart
    rules = RefreshRules.of(job.stage, is_exchanged, job.sdp, job.accumulate_dtype, numel)
    step = of_rank.portions(job.portion_numel, is_gathered=rules.is_gathered, is_exchanged=rules.is_exchanged)
    return Layout(
        **vars(of_rank),
        everyone=standing.owners[SHARED],
        levels=standing.levels,
        uses=model.uses,
        rules=rules,
        step=tuple(step),
        agreement=tuple(of_rank.portions(job.portion_numel, is_gathered=job.stage > 0, is_exchanged=bool(copies)))
        if job.sdp.schedule.is_apart
        else (),
    )


def _copies(model: WorkerModel, plan: SubnetworkPlan, worker: int) -> Iterator[Item]:
    """What others train and this rank computes with."""
    planned = {of.space.name: of for of in plan.spaces}
    index = 0
    for place, space in enumerate(model.spaces):
        chunks = planned[space].chunks if space is not None else ()
        for chunk in chunks:
            if worker not in plan.owner_sets[chunk.owner_set]:
                assert space is not None
                numel = model.numels[place] // planned[space].space.num_units * (chunk.stop - chunk.start)
                yield Item((place, chunk.start), chunk.owner_set, 0, numel, index, len(chunks) > 1)
                index += 1
