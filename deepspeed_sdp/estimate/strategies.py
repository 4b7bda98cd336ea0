"""The strategies that are compared: plain DeepSpeed and SDP, with every combination."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.deepspeed.refusals import check_apart, check_stage
from deepspeed_sdp.errors import ConfigError, PlanError
from deepspeed_sdp.estimate.estimator import Estimate, Estimator
from deepspeed_sdp.estimate.job import Job

COVERAGES = (0.25, 0.375, 0.5, 0.625, 0.75)
STAGES = (0, 1, 2, 3)
CHECKPOINTING = (False, True)


@dataclass(frozen=True)
class Choice:
    """A strategy at one stage, without activation checkpointing and with it.

    Attributes:
        variants: estimates that differ in ``job.checkpointing`` alone.
    """

    variants: tuple[Estimate, ...]

    @property
    def job(self) -> Job:
        """What the variants have in common."""
        return self.variants[0].job

    @property
    def best(self) -> Estimate:
        """The quickest variant that fits, or the one that takes least memory."""
        return min(self.variants, key=_merit)

    @property
    def fits(self) -> bool:
        """Whether a variant does."""
        return self.best.fits


def choice_of(estimator: Estimator, job: Job, checkpointing: Sequence[bool] = CHECKPOINTING) -> Choice:
    """``job`` with activation checkpointing as each of ``checkpointing`` says.

    Raises:
        ConfigError, ModelError, PlanError: see :meth:`Estimator.estimate`.
    """
    return Choice(tuple(estimator.estimate(replace(job, checkpointing=is_on)) for is_on in checkpointing))


def strategies(
    job: Job,
    num_subnetworks: int,
    block: dict[str, Any] | None = None,
    stages: Sequence[int] = STAGES,
    maskings: Sequence[str] = ("forward", "backward"),
    granularities: Sequence[str] = ("neuron", "layer"),
    coverages: Sequence[float] | None = None,
) -> Iterator[Job]:
    """``job`` without SDP at every stage, then with it: masking, granularity, coverage, stage.

    Left out is what the engine refuses (ZeRO-3 with backward masking), and of the default coverages those without a
    whole number of owners. All reduce and gather in pieces of the same size, the SDP engine's unless ``job`` says.

    Args:
        job: what all have in common.
        block: keys of the SDP block beside those that vary.
        coverages: ``None``: quarters to three quarters, in eighths.

    Raises:
        ConfigError: one of ``coverages`` gives no whole number of owners.
    """
    job = replace(job, bucket=job.round_numel, gather_bucket=job.portion_numel)
    for stage in stages:
        yield replace(job, stage=stage, sdp=None)
    whole = [coverage for coverage in COVERAGES if (coverage * num_subnetworks).is_integer()]
    for masking in maskings:
        for granularity in granularities:
            for coverage in whole if coverages is None else coverages:
                sdp = SDPConfig.parse(
                    {
                        **(block or {}),
                        "masking": masking,
                        "granularity": granularity,
                        "coverage": coverage,
                        "num_subnetworks": num_subnetworks,
                    }
                ).at_length(job.seq_length)
                sdp.owners(num_subnetworks)
                for stage in stages:
                    if not _is_refused(stage, sdp, job.world_size // num_subnetworks):
                        yield replace(job, stage=stage, sdp=sdp)


def _is_refused(stage: int, sdp: SDPConfig, replicas: int) -> bool:
    try:
        check_stage(stage, sdp)
        check_apart(stage, sdp, replicas)
    except ConfigError:
        return True
    return False


def compare(
    estimator: Estimator, jobs: Iterable[Job], checkpointing: Sequence[bool] = CHECKPOINTING
) -> tuple[list[Choice], list[str]]:
    """All jobs that are possible, and in words why others are not."""
    found, refused = [], []
    for job in jobs:
        try:
            found.append(choice_of(estimator, job, checkpointing))
        except (ConfigError, PlanError) as error:
            refused.append(f"{name_of(job)}: {error}")
    return found, list(dict.fromkeys(refused))


def name_of(job: Job) -> str:
    """What a table calls a strategy, without its stage."""
    if job.sdp is None:
        return "DeepSpeed"
    coverage = job.sdp.coverage
    share = str(Fraction(coverage).limit_denominator(4096)) if isinstance(coverage, float) else "K/N"
    return f"SDP {job.sdp.masking} {job.sdp.granularity} {share}"


def best_stages(choices: Sequence[Choice]) -> list[Choice]:
    """One choice for each strategy with SDP: the quickest stage that fits, or the one that takes least memory.

    Those of plain DeepSpeed are all kept.
    """
    groups: dict[Any, list[Choice]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(name_of(choice.job) if choice.job.sdp else index, []).append(choice)
    return [ranked(group)[0] for group in groups.values()]


def ranked(choices: Sequence[Choice]) -> list[Choice]:
    """Those that fit first, the quickest first; then the others, by what they take."""
    return sorted(choices, key=lambda choice: _merit(choice.best))


def _merit(estimate: Estimate) -> tuple[bool, float]:
    return not estimate.fits, estimate.time.total if estimate.fits else float(estimate.peak)
