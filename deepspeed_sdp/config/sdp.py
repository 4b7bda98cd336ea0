"""The SDP block: what a user writes under ``"subnetwork_data_parallel"`` or into the file of ``--sdp_config``."""

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from deepspeed_sdp.config.blocks import (
    BLOCK,
    MAX_COUNT,
    MAX_WORKERS,
    BackwardBlock,
    Block,
    CheckpointBlock,
    CommBlock,
    Coverage,
    Kind,
    PlanBlock,
    ScheduleBlock,
    read_coverage,
)
from deepspeed_sdp.config.defaults import default_owner_sets, default_subnetworks
from deepspeed_sdp.config.json_file import read_json
from deepspeed_sdp.config.messages import in_words
from deepspeed_sdp.errors import ConfigError

_SHOWN_FRACTIONS = 16

# A plan file for more workers than these is taken only with the key, so that nobody gets them unawares.
MOST_UNASKED_SUBNETWORKS = 64

# What a plan file settles, beside the block "plan".
_SAID_BY_A_PLAN = ("design", "worker_capacity", "max_owner_sets", "chunk_multiple", "seq_length")


class SDPConfig(Block):
    """The typed block. Every error names the key, what it got and what it takes.

    Raises (through :meth:`parse`): :class:`ConfigError`.
    """

    enabled: bool = Field(True, description="false: plain DeepSpeed, as if the block were absent")
    masking: Literal["forward", "backward"] = Field(
        "forward", description="units not owned: removed (forward), or computed with but not trained (backward)"
    )
    granularity: Literal["neuron", "branch", "layer"] = Field(
        "neuron",
        description="what a unit is: an MLP neuron or attention KV group, a whole MLP or attention block, or a whole "
        "decoder layer",
    )
    coverage: Coverage | dict[Kind, Coverage] = Field(
        0.5, description='K/N, the share of the units that one worker holds, as 0.5 or "1/2"; or one for each kind'
    )
    num_subnetworks: int | None = Field(
        None, ge=1, le=MAX_WORKERS, description="N; divides the world size, default: the largest divisor up to 8"
    )
    partition: tuple[Kind, ...] | None = Field(
        None,
        min_length=1,
        description="kinds of units that are partitioned, as mlp and attention of a transformer; default: all",
    )
    shared_modules: tuple[str, ...] = Field((), description="name patterns of modules that all workers own")
    share_ends: int = Field(
        0, ge=0, le=MAX_COUNT, description="so many layers at the beginning, and at the end, are owned by all workers"
    )
    output_scaling: Literal["none", "inverse_sqrt_coverage", "inverse_coverage"] = Field(
        "inverse_sqrt_coverage",
        description="factor on what the partitioned units add to the residual stream of a subnetwork",
    )
    calibration_sequences: int = Field(
        64,
        ge=0,
        le=MAX_COUNT,
        description="of the last step, on which launch/ scripts and Trainer calibrate the full model before it is "
        "evaluated or saved; 0: never",
    )
    evaluation: Literal["auto", "gathered", "streamed"] = Field(
        "auto",
        description="of the full model in HuggingFace's Trainer: all its weights on every rank meanwhile, or a layer; "
        "auto: a layer where there is no memory for all",
    )
    plan: PlanBlock = Field(default_factory=PlanBlock, description="who owns what")
    checkpoint: CheckpointBlock = Field(
        default_factory=CheckpointBlock, description="how they are written, and what stays"
    )
    backward: BackwardBlock = Field(default_factory=BackwardBlock, description="of backward masking alone")
    comm: CommBlock = Field(default_factory=CommBlock, description="what crosses the network, and its checks")
    schedule: ScheduleBlock = Field(
        default_factory=ScheduleBlock, description="subnetworks that change during the training"
    )

    @model_validator(mode="before")
    @classmethod
    def _begin_as_scheduled(cls, block: Any) -> Any:
        # What is malformed is judged later.
        try:
            first = read_coverage(block["schedule"]["coverage_schedule"][0][1])
        except (TypeError, KeyError, IndexError):
            return block
        return {**block, "coverage": first} if isinstance(first, float) and 0 < first <= 1 else block

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        said = [f"plan.{key}" for key in _SAID_BY_A_PLAN if key in self.plan.model_fields_set]
        said += ["coverage"] if "coverage" in self.model_fields_set and not self.schedule.coverage_schedule else []
        if self.plan.file is not None and said:
            raise ConfigError(
                f"{BLOCK}.plan.file: got {self.plan.file!r} with {', '.join(sorted(said))}; takes it alone, the file "
                "settles that"
            )
        stages = self.schedule.coverage_schedule
        if stages and self.plan.file is not None:
            raise ConfigError(
                f"{BLOCK}.schedule.coverage_schedule: got it with plan.file, which has one coverage; takes one of them"
            )
        if self.schedule.is_apart and self.comm.consistency_check_interval:
            raise ConfigError(
                f"{BLOCK}.comm.consistency_check_interval: got {self.comm.consistency_check_interval} with local steps "
                "(schedule.sync_interval, schedule.outer_optimizer); takes 0 there, where owners differ between rounds"
            )
        if self.schedule.is_apart and self.comm.transport == "all_to_all":
            raise ConfigError(
                f'{BLOCK}.comm.transport: got "all_to_all" with local steps (schedule.sync_interval, '
                'schedule.outer_optimizer); takes "auto" or "owner_sets" there, where only replicas average gradients'
            )
        if self.schedule.sync_delay and self.masking == "backward":
            raise ConfigError(
                f'{BLOCK}.schedule.sync_delay: got {self.schedule.sync_delay} with masking "backward"; takes 0 there, '
                "as copies of what owners agree on must not mix with what they train meanwhile"
            )
        if self.schedule.is_apart and self.backward.overlap_refresh:
            raise ConfigError(
                f"{BLOCK}.backward.overlap_refresh: got true with local steps (schedule.sync_interval, "
                "schedule.outer_optimizer); takes false there, where copies arrive at the end of a round"
            )
        if self.masking == "backward" and "output_scaling" in self.model_fields_set and self.output_scaling != "none":
            raise ConfigError(
                f'{BLOCK}.output_scaling: got "{self.output_scaling}" with masking "backward"; takes "none" there, as '
                "the forward pass is the full model's"
            )
        if self.backward.overlap_refresh and self.masking != "backward":
            raise ConfigError(
                f'{BLOCK}.backward.overlap_refresh: got true with masking "{self.masking}"; takes masking "backward", '
                "where ranks hold copies"
            )
        if self.backward.recompute_frozen and (self.masking != "backward" or self.block_unit is None):
            raise ConfigError(
                f'{BLOCK}.backward.recompute_frozen: got true with masking "{self.masking}" and granularity '
                f'"{self.granularity}"; takes masking "backward" and granularity "branch" or "layer", where whole '
                "blocks are frozen"
            )
        return self

    @classmethod
    def of(cls, source: "SDPSource", key: str = "sdp_config") -> "SDPConfig":
        """The block, however it is given: as a dict, a file, or read already.

        A dict or file may wrap it under ``"subnetwork_data_parallel"``. ``key`` names a file in errors.

        Raises:
            ConfigError: an unreadable file, or see :meth:`parse`.
        """
        return source if isinstance(source, SDPConfig) else cls.parse(read_block(source, key))

    @property
    def block_unit(self) -> Literal["layer", "branch"] | None:
        """Which residual block is a unit; ``None`` at neuron granularity."""
        return None if self.granularity == "neuron" else self.granularity

    @classmethod
    def parse(cls, block: Mapping[str, Any]) -> Self:
        """Validate a plain dict.

        Raises:
            ConfigError: unknown key, impossible value, contradicting values, or a feature that is not built yet.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(f"{BLOCK}: got {type(block).__name__}; takes an object with keys, see the README")
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise ConfigError(in_words(error, BLOCK, cls, block)) from None

    def written(self) -> dict[str, Any]:
        """The block as a user would write it, all keys with their values; JSON."""
        return self.model_dump(mode="json", by_alias=True)

    def at_length(self, seq_length: int) -> Self:
        """The block in a job of such sequences: workers are balanced at them, unless the block or a plan file says."""
        if self.plan.file is not None or "seq_length" in self.plan.model_fields_set:
            return self
        plan = self.plan.model_copy(update={"seq_length": seq_length})
        return self.model_copy(update={"plan": plan})

    def subnetworks(self, world_size: int) -> int:
        """``N`` for a world of ``world_size`` ranks.

        Raises:
            ConfigError: ``num_subnetworks`` does not divide the world size.
        """
        count = self.num_subnetworks or default_subnetworks(world_size)
        if world_size % count:
            divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
            more = f", or more ranks: {more_ranks(count)}" if world_size == 1 else ""
            raise ConfigError(
                f"{BLOCK}.num_subnetworks: got {count} with a world size of {world_size}; takes a number that "
                f"divides the world size: {', '.join(map(str, divisors))}{more}"
            )
        return count

    def largest(self) -> Self:
        """The block of the stage of its schedule with the most coverage; without one, itself."""
        stages = self.schedule.stages()
        if not stages:
            return self
        still = self.schedule.model_copy(update={"coverage_schedule": ()})
        return self.model_copy(update={"coverage": max(coverage for coverage, _ in stages), "schedule": still})

    def of_one_rank(self) -> Self:
        """The block in a world of one rank, which owns every unit whatever the coverage says."""
        return self.model_copy(update={"coverage": 1.0})

    def owners(self, num_subnetworks: int) -> int | dict[str, int]:
        """``K`` for ``N`` subnetworks, or ``K`` for every kind of unit.

        Raises:
            ConfigError: the coverage gives no whole ``K``, or is one for each kind where whole layers are units.
        """
        if not isinstance(self.coverage, Mapping):
            note = "" if "coverage" in self.model_fields_set else " (the default)"
            return self._whole_owners(f"{BLOCK}.coverage", self.coverage, num_subnetworks, note)
        if self.granularity == "layer":
            raise ConfigError(
                f"{BLOCK}.coverage: got {json.dumps(self.coverage)} with whole layers as units; takes one number"
            )
        return {
            kind: self._whole_owners(f"{BLOCK}.coverage.{kind}", share, num_subnetworks)
            for kind, share in self.coverage.items()
        }

    def capacity(self, num_subnetworks: int) -> tuple[float, ...] | None:
        """``plan.worker_capacity``, which must have one number per worker.

        Raises:
            ConfigError: it has not.
        """
        capacity = self.plan.worker_capacity
        if capacity is not None and len(capacity) != num_subnetworks:
            raise ConfigError(
                f"{BLOCK}.plan.worker_capacity: got {len(capacity)} numbers; takes one for each of the "
                f"{num_subnetworks} subnetworks"
            )
        return capacity

    def owner_sets_bound(self, num_subnetworks: int, backend: str) -> int:
        """``plan.max_owner_sets`` of a job of so many subnetworks whose collectives run on ``backend``."""
        return self.plan.max_owner_sets or default_owner_sets(num_subnetworks, backend)

    def _whole_owners(self, key: str, value: float, workers: int, note: str = "") -> int:
        # 0.3333 stands for 1/3: the nearest fraction with denominator N counts if it is as close as a float is typed.
        owners = round(value * workers)
        if owners < 1 or abs(value - owners / workers) > 1e-3 * value:
            # The nearest ones where there are many.
            first = max(1, min(owners - _SHOWN_FRACTIONS // 2, workers - _SHOWN_FRACTIONS + 1))
            last = min(workers, first + _SHOWN_FRACTIONS - 1)
            takes = ", ".join(str(Fraction(k, workers)) for k in range(first, last + 1))
            default = "the largest divisor of the world size up to 8"
            raise ConfigError(
                f"{key}: got {value:g}{note} with {workers} subnetworks, which gives {value * workers:g} owners per "
                f"unit; takes a whole number of owners: {takes}"
                + (", ..." if workers > _SHOWN_FRACTIONS else "")
                + ("" if self.num_subnetworks else f"; or another num_subnetworks (default: {default})")
            )
        return owners


SDPSource: TypeAlias = SDPConfig | Mapping[str, Any] | str | Path
"""The SDP block as functions take it: a dict, a path to a JSON file, or read already."""


def more_ranks(count: int | str) -> str:
    """How a script gets more ranks than one, for messages."""
    return f"deepspeed --num_accelerators {count}, or torchrun --nproc_per_node {count}"


def split_block(ds_config: Mapping[str, Any], sdp_config: SDPSource | None) -> SDPConfig:
    """The SDP block of a job, from ``sdp_config`` or from inside the DeepSpeed config.

    Raises:
        ConfigError: no block, two blocks, an unreadable file, or an invalid block.
    """
    inside = ds_config.get(BLOCK)
    if sdp_config is None:
        if inside is None:
            raise ConfigError(f'no SDP block: give sdp_config, or "{BLOCK}" in the DeepSpeed config')
        return SDPConfig.parse(inside)
    if inside is not None:
        raise ConfigError(f'two SDP blocks: sdp_config is given and the DeepSpeed config holds "{BLOCK}"; takes one')
    return SDPConfig.of(sdp_config)


def say_total_steps(ds_config: Mapping[str, Any], steps: int) -> None:
    """Let a schedule of coverages in the block of ``ds_config`` know the length of the training, unless it says it."""
    block = ds_config.get(BLOCK)
    schedule = block.get("schedule") if isinstance(block, dict) else None
    if (
        isinstance(schedule, dict)
        and schedule.get("coverage_schedule")
        and schedule.get("total_steps") in (None, "auto")
    ):
        schedule["total_steps"] = steps


def read_block(source: Mapping[str, Any] | str | Path, key: str) -> Any:
    """The block as it is written in a dict or file, which may wrap it under ``"subnetwork_data_parallel"``.

    Raises:
        ConfigError: see :func:`read_json`.
    """
    block: Any = read_json(source, key) if isinstance(source, str | Path) else source
    return block[BLOCK] if isinstance(block, Mapping) and set(block) == {BLOCK} else block
