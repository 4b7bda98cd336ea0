"""The strategies that are compared: plain DeepSpeed and SDP, with every combination."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.errors import ConfigError, PlanError
from deepspeed_sdp.estimate.estimator import Estimate, Estimator
from deepspeed_sdp.estimate.job import Job

COVERAGES = (0.25, 0.375, 0.5, 0.625, 0.75)
STAGES = (0, 1, 2, 3)


def strategies(
    job: Job,
    num_subnetworks: int,
    block: dict[str, Any] | None = None,
    stages: Sequence[int] = STAGES,
    maskings: Sequence[str] = ("forward", "backward"),
    granularities: Sequence[str] = ("neuron", "block"),
    coverages: Sequence[float] = COVERAGES,
) -> Iterator[Job]:
    """``job`` without SDP at every stage, then with it: masking, granularity, coverage, stage.

    Left out is what the engine refuses: coverages without a whole number of owners, and ZeRO-3 with backward masking.

    Args:
        job: what all have in common.
        block: keys of the SDP block beside those that vary.
    """
    for stage in stages:
        yield replace(job, stage=stage, sdp=None)
    for masking in maskings:
        for granularity in granularities:
            for coverage in coverages:
                owners = Fraction(coverage).limit_denominator(4096) * num_subnetworks
                if owners.denominator != 1 or owners < 1:
                    continue
                sdp = SDPConfig.parse(
                    {
                        **(block or {}),
                        "masking": masking,
                        "granularity": granularity,
                        "coverage": coverage,
                        "num_subnetworks": num_subnetworks,
                        "seq_length": job.seq_length,
                    }
                )
                for stage in stages:
                    if not (masking == "backward" and stage == 3):
                        yield replace(job, stage=stage, sdp=sdp)


def compare(estimator: Estimator, jobs: Sequence[Job]) -> tuple[list[Estimate], list[str]]:
    """Estimates of all jobs that are possible, and in words why others are not."""
    found, refused = [], []
    for job in jobs:
        try:
            found.append(estimator.estimate(job))
        except (ConfigError, PlanError) as error:
            refused.append(f"{name_of(job)}: {error}")
    return found, list(dict.fromkeys(refused))


def default_subnetworks(world_size: int) -> int:
    """The largest divisor of the world size up to 8."""
    return max(n for n in range(1, min(8, world_size) + 1) if world_size % n == 0)


def name_of(job: Job) -> str:
    """What a table calls a strategy, without its stage."""
    if job.sdp is None:
        return "DeepSpeed"
    coverage = job.sdp.coverage
    share = str(Fraction(coverage).limit_denominator(4096)) if isinstance(coverage, float) else "K/N"
    return f"SDP {job.sdp.masking} {job.sdp.granularity} {share}"


def best_stages(estimates: Sequence[Estimate]) -> list[Estimate]:
    """One estimate for each strategy with SDP: the quickest stage that fits, or the one that takes least memory.

    Those of plain DeepSpeed are all kept.
    """
    groups: dict[Any, list[Estimate]] = {}
    for index, estimate in enumerate(estimates):
        groups.setdefault(name_of(estimate.job) if estimate.job.sdp else index, []).append(estimate)
    return [min(group, key=_merit) for group in groups.values()]


def _merit(estimate: Estimate) -> tuple[bool, float]:
    return not estimate.fits, estimate.time.total if estimate.fits else float(estimate.peak)
