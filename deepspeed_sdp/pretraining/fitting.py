"""A run on another number of ranks than it began with: its subnetworks and its batch, as near as can be. Pure."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_sdp.config import BLOCK, SDPConfig
from deepspeed_sdp.data.streaming import lanes_for
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.pretraining.recipe import Run

_NEAR = 0.1


@dataclass(frozen=True)
class First:
    """What a run was when it began.

    Attributes:
        ranks: that it began with.
        steps: of optimizer, in all.
    """

    ranks: int
    steps: int


def check_fits(run: Run) -> None:
    """Whether a run can go on with other numbers of ranks.

    Raises:
        ConfigError: something in it is for one number of subnetworks.
    """
    if not run.sdp.enabled:
        raise ConfigError(
            "--elastic: got the dense baseline; takes SDP, whose state can be kept in memory (with sdp.coverage 1 it "
            "trains the same model)"
        )
    for key in ("file", "worker_capacity"):
        if getattr(run.sdp.plan, key) is not None:
            raise ConfigError(f"--elastic: got sdp.plan.{key}, which is for one number of subnetworks; takes none")


def most_ranks(run: Run, first: First, ranks: int) -> int:
    """How many of ``ranks`` can train: all of them, but the lanes of a stream are dealt evenly."""
    if run.data.source != "stream":
        return ranks
    lanes = run.data.num_lanes or lanes_for(run.global_batch(first.ranks), first.ranks)
    return max(number for number in range(1, ranks + 1) if lanes % number == 0)


def fitted(run: Run, first: First, ranks: int) -> Run:
    """``run`` as it goes on with ``ranks``: of as many steps.

    Its global batch is within a tenth of what it was, with the largest micro-batches up to those it had, or as near as
    can be; of a stream, the same. Units have no more owners than their coverage says, but for one.

    Raises:
        ConfigError: no batch can be had.
    """
    if ranks == first.ranks:
        return run
    batch, micro = run.global_batch(first.ranks), run.micro_batch(first.ranks)
    micro, accumulation = _batch(batch, micro, ranks, run.data.source == "stream")
    block = {**run.ds_config[BLOCK], **_block(run.sdp, first.ranks, ranks)}
    ds_config = {
        **run.ds_config,
        BLOCK: block,
        "train_batch_size": micro * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    sdp = SDPConfig.parse(block).at_length(run.data.seq_length)
    length = run.length.model_copy(update={"steps": first.steps})
    return dataclasses.replace(run, length=length, sdp=sdp, ds_config=ds_config)


def _batch(batch: int, micro: int, ranks: int, is_exact: bool) -> tuple[int, int]:
    """Micro-batch and accumulation."""
    if is_exact:
        each = batch // ranks
        micro = max(size for size in range(1, micro + 1) if each % size == 0)
        return micro, each // micro
    sizes = [(size, max(1, round(batch / (ranks * size)))) for size in range(1, micro + 1)]

    def how_near(size: tuple[int, int]) -> tuple[float, int]:
        away = abs(size[0] * size[1] * ranks / batch - 1)
        # Many small micro-batches cost more than a batch that is a little smaller or larger.
        return (0 if away <= _NEAR else away), -size[0]

    return min(sizes, key=how_near)


def _block(sdp: SDPConfig, before: int, ranks: int) -> dict[str, Any]:
    """Keys of the SDP block that are others on ``ranks``."""
    had = sdp.subnetworks(before)
    # Replicas share the state of an optimizer where workers train apart.
    fewest = 2 if sdp.schedule.is_apart and before > had else 1
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    workers = min(divisors, key=lambda n: (ranks // n < fewest, abs(math.log(n / had)), -n))

    def share(coverage: float) -> str:
        owners = round(coverage * had)
        now = workers if owners == had else max(1, owners * workers // had)
        return f"{now}/{workers}"

    coverage: Any = sdp.coverage
    coverage = (
        {kind: share(of_kind) for kind, of_kind in coverage.items()}
        if isinstance(coverage, Mapping)
        else share(coverage)
    )
    block: dict[str, Any] = {"num_subnetworks": workers, "coverage": coverage}
    if sdp.plan.rank_order != "auto":
        block["plan"] = {**sdp.plan.model_dump(mode="json", exclude_unset=True), "rank_order": "auto"}
    stages = sdp.schedule.coverage_schedule
    if stages:
        del block["coverage"]
        said = sdp.schedule.model_dump(mode="json", exclude_unset=True)
        block["schedule"] = {**said, "coverage_schedule": [[begin, share(of_stage)] for begin, of_stage in stages]}
    return block
