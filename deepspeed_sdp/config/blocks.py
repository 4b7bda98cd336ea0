"""The blocks inside the SDP block, one class each."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from deepspeed_sdp.errors import ConfigError

BLOCK = "subnetwork_data_parallel"

# Short enough for any use, so that no number is too large for a float.
_FRACTION = re.compile(r"\s*[0-9]{1,9}\s*/\s*0*[1-9][0-9]{0,8}\s*", re.ASCII)


def read_coverage(value: Any) -> Any:
    """A coverage as it is written, ``0.5`` or ``"1/2"``: a fraction as a number; what is none is judged later."""
    is_fraction = isinstance(value, str) and _FRACTION.fullmatch(value)
    return float(Fraction(value.replace(" ", ""))) if is_fraction else value


# Which ones there are, the model's adapter says.
Kind = Annotated[str, Field(pattern="^[a-z][a-z_]{0,63}$")]
# Bounds far above any use: what is made from a number must not grow out of hand, or out of what libraries can take.
MAX_WORKERS = 2**14
_MAX_OWNER_SETS = 1024
MAX_COUNT = 2**40

_NUMBER = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_EITHER = {"anyOf": [_NUMBER, {"type": "string", "pattern": "^[0-9]{1,9}/[0-9]{1,9}$"}]}
Coverage = Annotated[float, BeforeValidator(read_coverage), Field(gt=0, le=1), WithJsonSchema(_EITHER)]
Capacity = Annotated[float, Field(ge=1e-6, le=1e6)]


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_auto_out(cls, block: Any) -> Any:
        # In a DeepSpeed config "auto" leaves a value to others: here, to the default.
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if not isinstance(block, Mapping):
            return block
        return {key: value for key, value in block.items() if not (key in known and value == "auto")}

    @field_validator("*", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, list | tuple):
            return value
        # Before every item is looked at.
        if len(value) > MAX_WORKERS:
            raise ValueError(f"got {len(value)} values; takes at most {MAX_WORKERS}")
        return tuple(value)


class PlanBlock(Block):
    """``plan``: who owns what."""

    design: Literal["auto", "cyclic", "random"] = Field("auto", description="how owner sets are chosen")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the plan and of the unit-wise initialisation")
    chunk_multiple: int = Field(
        64, ge=1, le=MAX_COUNT, description="chunk borders are multiples of this where sizes allow"
    )
    max_owner_sets: int | None = Field(
        None,
        ge=1,
        le=_MAX_OWNER_SETS,
        description="upper bound of the number of process groups; default: 64 on gloo, elsewhere 16 for up to 8 "
        "subnetworks",
    )
    file: str | None = Field(None, description="a plan made before (deepspeed-sdp plan --out), instead of a design")
    worker_capacity: tuple[Capacity, ...] | None = Field(
        None, min_length=1, description="relative speeds of the N workers, which then own units in proportion"
    )
    rank_order: Literal["auto", "round_robin", "owners_within_node", "owners_across_nodes"] = Field(
        "auto", description="which rank trains which subnetwork; auto: replicas of one side by side"
    )
    seq_length: int = Field(
        2048,
        ge=1,
        le=MAX_COUNT,
        description="sequence length at which the workers' FLOPs are balanced; a recipe's own where it does not say",
    )


class CheckpointBlock(Block):
    """``checkpoint``: how they are written, and what stays."""

    is_async: bool = Field(
        False, alias="async", description="write checkpoints beside the training, from a copy on the CPU"
    )
    copies: int = Field(
        1,
        ge=1,
        le=MAX_WORKERS,
        description="owners that write each element; a checkpoint survives the loss of one worker's files less",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="what the job does when a checkpoint cannot be written"
    )
    keep_last: int = Field(0, ge=0, le=MAX_COUNT, description="checkpoints kept in a folder, 0: all")
    keep_every: int = Field(0, ge=0, le=MAX_COUNT, description="older ones of multiples of so many steps are kept too")


class BackwardBlock(Block):
    """``backward``: of backward masking alone."""

    overlap_refresh: bool = Field(
        False, description="copies may arrive during the next forward pass, which waits for them"
    )
    recompute_frozen: bool = Field(
        False, description="recompute blocks that are not owned instead of keeping their activations"
    )


class CommBlock(Block):
    """``comm``: what crosses the network, and its checks."""

    transport: Literal["auto", "owner_sets", "all_to_all"] = Field(
        "auto", description="how gradients and weights cross the network; auto: what is faster on the backend"
    )
    on_nonfinite: Literal["skip", "stop"] = Field("skip", description="what a step with NaN or Inf gradients does")
    consistency_check_interval: int = Field(
        0, ge=0, le=MAX_COUNT, description="steps between two comparisons of the owners' weights, 0: never"
    )


def _as_pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_Share = Annotated[float, Field(ge=0, lt=1)]
_Stage = Annotated[tuple[_Share, Coverage], BeforeValidator(_as_pair)]


class OuterOptimizer(Block):
    """``schedule.outer_optimizer``: an SGD whose gradient is the owners' average change since they last agreed."""

    lr: float = Field(0.7, gt=0, le=1e6, description="learning rate; 1 without momentum takes the average itself")
    momentum: float = Field(0.9, ge=0, lt=1, description="of earlier changes")
    nesterov: bool = Field(True, description="whether the momentum looks ahead")


class ScheduleBlock(Block):
    """``schedule``: subnetworks that change during the training."""

    resample_interval: int = Field(
        0, ge=0, le=MAX_COUNT, description="optimizer steps after which workers own other units, 0: never"
    )
    resample: Literal["rotate", "random"] = Field(
        "rotate", description="which ones: chunks of units move on by one, or to places drawn by plan.seed"
    )
    coverage_schedule: tuple[_Stage, ...] = Field(
        (),
        description="[[0.0, 0.25], [0.5, 0.5], [0.9, 1.0]]: from which share of the training on which coverage, in "
        "place of coverage",
    )
    total_steps: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="optimizer steps of the training, of which coverage_schedule says shares; recipes and Trainer know",
    )
    moments: Literal["move", "reset"] = Field(
        "move", description="what becomes of the optimizer's state: goes with its unit, or begins anew each time"
    )

    sync_interval: int = Field(
        1,
        ge=1,
        le=MAX_COUNT,
        description="optimizer steps that workers train apart before those who own a unit agree on it; 1: gradients "
        "are averaged in every step",
    )
    sync_delay: int = Field(
        0,
        ge=0,
        le=MAX_COUNT,
        description="steps that training goes on while owners agree on the weights of a round's end; then it takes "
        "over what that changed",
    )
    moments_sync: bool = Field(
        False,
        description="whether owners average the inner optimizer's state of a unit too: with Adam three times the bytes",
    )
    outer_optimizer: OuterOptimizer | None = Field(
        None, description="what is done with the owners' average change; without it the average itself is taken"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        shares = [share for share, _ in self.coverage_schedule]
        if shares and (shares[0] != 0 or any(left >= right for left, right in pairwise(shares))):
            raise ConfigError(
                f"{BLOCK}.schedule.coverage_schedule: got the shares {', '.join(f'{share:g}' for share in shares)}; "
                "takes shares that begin at 0 and ascend"
            )
        if self.moments_sync and (self.sync_delay or not self.is_apart):
            raise ConfigError(
                f"{BLOCK}.schedule.moments_sync: got true with sync_interval {self.sync_interval} and sync_delay "
                f"{self.sync_delay}; takes local steps without a delay"
            )
        if self.sync_delay and self.sync_delay >= self.sync_interval:
            raise ConfigError(
                f"{BLOCK}.schedule.sync_delay: got {self.sync_delay} with sync_interval {self.sync_interval}; takes "
                "less, as one round's agreement ends before the next one's begins"
            )
        return self

    @property
    def is_apart(self) -> bool:
        """Whether workers train apart, and agree on weights and not on gradients."""
        return self.sync_interval > 1 or self.outer_optimizer is not None

    def coverage_at(self, step: int) -> float | None:
        """The coverage after ``step`` steps; ``None`` where it does not change.

        Raises:
            ConfigError: nobody says how many steps there are.
        """
        if not self.coverage_schedule:
            return None
        if self.total_steps is None:
            raise ConfigError(
                f"{BLOCK}.schedule.total_steps: got nothing with coverage_schedule; takes the optimizer steps of the "
                "training"
            )
        return [coverage for share, coverage in self.coverage_schedule if step >= share * self.total_steps][-1]

    def describe(self, steps: int) -> str:
        """What changes in a training of so many steps, in words; nothing where nothing does."""
        begins = [(coverage, math.ceil(share * steps)) for share, coverage in self.coverage_schedule]
        said = [f"coverage {coverage:g} from step {step:,}" for coverage, step in begins]
        if self.resample_interval:
            said.append(f"other units every {self.resample_interval:,} steps ({self.resample})")
        if self.is_apart:
            how = "" if self.outer_optimizer is None else f", outer SGD at {self.outer_optimizer.lr:g}"
            said.append(f"owners agree every {self.sync_interval:,} steps{how}")
        return "; ".join(said)

    def stages(self) -> tuple[tuple[float, float], ...]:
        """Every coverage, and the share of the training that it has."""
        ends = [share for share, _ in self.coverage_schedule[1:]] + [1.0] * bool(self.coverage_schedule)
        return tuple((c, end - share) for (share, c), end in zip(self.coverage_schedule, ends, strict=True))
