"""The SDP block: what a user writes under ``"subnetwork_data_parallel"`` or into the file of ``--sdp_config``."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.json_text import parse_json, read_json_text, shown

BLOCK = "subnetwork_data_parallel"
_MAX_MESSAGES = 10
_LONGEST_KEY = 100
_SHOWN_FRACTIONS = 16

DEFAULT_COVERAGE = 0.5
# A plan file for more workers than these is taken only with the key, so that nobody gets them unawares.
MOST_UNASKED_SUBNETWORKS = 64
_MOST_DEFAULT_SUBNETWORKS = 8

# Keys of the design whose feature is not built yet: (key, the values that work today, what is missing).
_NOT_BUILT: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("resample_interval", (0,), "resampling the plan in mid-run"),
    ("sync_interval", (1,), "synchronising every H steps"),
)


# Short enough for any use, so that no number is too large for a float.
_FRACTION = re.compile(r"\s*[0-9]{1,9}\s*/\s*0*[1-9][0-9]{0,8}\s*", re.ASCII)


def read_coverage(value: Any) -> Any:
    """A coverage as it is written, ``0.5`` or ``"1/2"``: a fraction as a number; what is none is judged later."""
    is_fraction = isinstance(value, str) and _FRACTION.fullmatch(value)
    return float(Fraction(value.replace(" ", ""))) if is_fraction else value


Kind = Literal["mlp", "attention"]
# Bounds far above any use: what is made from a number must not grow out of hand, or out of what libraries can take.
MAX_WORKERS = 2**14
_MAX_OWNER_SETS = 1024
_MAX_COUNT = 2**40

Coverage = Annotated[float, BeforeValidator(read_coverage), Field(gt=0, le=1)]
Owners = Annotated[int, Field(ge=1, le=MAX_WORKERS)]
Capacity = Annotated[float, Field(ge=1e-6, le=1e6)]


# What a plan file settles.
_SAID_BY_A_PLAN = frozenset(
    {"coverage", "owners_per_unit", "worker_capacity", "design", "max_owner_sets", "chunk_multiple", "seq_length"}
)


class SDPConfig(BaseModel):
    """The typed block. Every error names the key, what it got and what it takes.

    Raises (through :meth:`parse`): :class:`ConfigError`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = Field(True, description="false: plain DeepSpeed, as if the block were absent")
    masking: Literal["forward", "backward"] = Field(
        "forward", description="units not owned: removed (forward), or computed with but not trained (backward)"
    )
    granularity: Literal["neuron", "block"] = Field("neuron", description="what a unit is")
    block_unit: Literal["layer", "branch"] | None = Field(
        None, description="at block granularity: decoder layers (the default), or attention and MLP branches"
    )
    recompute_frozen: bool = Field(
        False, description="backward masking of blocks: recompute those not owned instead of keeping activations"
    )
    overlap_refresh: bool = Field(
        False, description="backward masking: copies may arrive during the next forward pass, which waits for them"
    )
    num_subnetworks: int | None = Field(
        None, ge=1, le=MAX_WORKERS, description="N; divides the world size, default: the largest divisor up to 8"
    )
    coverage: Coverage | dict[Kind, Coverage] | None = Field(
        None, description='K/N, the share of the units that one worker holds, as 0.5 or "1/2"; or one for each kind'
    )
    owners_per_unit: Owners | dict[Kind, Owners] | None = Field(None, description="K, instead of coverage")
    worker_capacity: tuple[Capacity, ...] | None = Field(
        None, min_length=1, description="relative speeds of the N workers, which then own units in proportion"
    )
    partition: tuple[Literal["mlp", "attention"], ...] = Field(
        ("mlp", "attention"), min_length=1, description="kinds of units that are partitioned"
    )
    shared_modules: tuple[str, ...] = Field((), description="name patterns of modules that all workers own")
    output_scaling: Literal["none", "inverse_sqrt_coverage", "inverse_coverage"] = Field(
        "inverse_sqrt_coverage",
        description="factor on what the partitioned units add to the residual stream of a subnetwork",
    )
    calibration_sequences: int = Field(
        64,
        ge=0,
        le=_MAX_COUNT,
        description="of the last step, on which launch/ scripts and Trainer calibrate the full model before it is "
        "evaluated or saved; 0: never",
    )
    design: Literal["auto", "cyclic", "random"] = Field("auto", description="how owner sets are chosen")
    plan_file: str | None = Field(
        None, description="a plan made before (deepspeed-sdp plan --out), instead of a design"
    )
    rank_order: Literal["auto", "round_robin", "owners_within_node", "owners_across_nodes"] = Field(
        "auto", description="which rank trains which subnetwork; auto: replicas of one side by side"
    )
    max_owner_sets: int | None = Field(
        None,
        ge=1,
        le=_MAX_OWNER_SETS,
        description="upper bound of the number of process groups; default: 64 on gloo, elsewhere 16 for up to 8 "
        "subnetworks",
    )
    seq_length: int = Field(
        2048, ge=1, le=_MAX_COUNT, description="sequence length at which the workers' FLOPs are balanced"
    )
    chunk_multiple: int = Field(
        64, ge=1, le=_MAX_COUNT, description="chunk borders are multiples of this where sizes allow"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the plan and of the unit-wise initialisation")
    transport: Literal["auto", "owner_sets", "all_to_all"] = Field(
        "auto", description="how gradients and weights cross the network; auto: what is faster on the backend"
    )
    on_nonfinite: Literal["skip", "stop"] = Field("skip", description="what a step with NaN or Inf gradients does")
    consistency_check_interval: int = Field(
        0, ge=0, le=_MAX_COUNT, description="steps between two comparisons of the owners' weights, 0: never"
    )
    evaluation: Literal["auto", "gathered", "streamed"] = Field(
        "auto",
        description="of the full model in HuggingFace's Trainer: all its weights on every rank meanwhile, or a layer; "
        "auto: a layer where there is no memory for all",
    )
    checkpoint_async: bool = Field(False, description="write checkpoints beside the training, from a copy on the CPU")
    checkpoint_copies: int = Field(
        1,
        ge=1,
        le=MAX_WORKERS,
        description="owners that write each element; a checkpoint survives the loss of one worker's files less",
    )
    checkpoint_on_error: Literal["stop", "continue"] = Field(
        "stop", description="what the job does when a checkpoint cannot be written"
    )
    checkpoint_keep_last: int = Field(0, ge=0, le=_MAX_COUNT, description="checkpoints kept in a folder, 0: all")
    checkpoint_keep_every: int = Field(
        0, ge=0, le=_MAX_COUNT, description="older ones of multiples of so many steps are kept too"
    )
    resample_interval: int = Field(0, ge=0, le=_MAX_COUNT, description="steps between two plans, 0: never")
    sync_interval: int = Field(1, ge=1, le=_MAX_COUNT, description="steps between two synchronisations")

    @field_validator("partition", "shared_modules", "worker_capacity", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, list | tuple):
            return value
        # Before every item is looked at.
        if len(value) > MAX_WORKERS:
            raise ConfigError(f"{BLOCK}.{info.field_name}: got {len(value)} values; takes at most {MAX_WORKERS}")
        return tuple(value)

    @model_validator(mode="after")
    def _one_of_coverage_and_owners(self) -> Self:
        if self.coverage is not None and self.owners_per_unit is not None:
            raise ConfigError(
                f"{BLOCK}: got both coverage={self.coverage} and owners_per_unit={self.owners_per_unit}; "
                "takes one of the two"
            )
        said = sorted(_SAID_BY_A_PLAN & self.model_fields_set)
        if self.plan_file is not None and said:
            raise ConfigError(
                f"{BLOCK}.plan_file: got {self.plan_file!r} with {', '.join(said)}; takes it alone, the file "
                "settles that"
            )
        if self.masking == "backward" and "output_scaling" in self.model_fields_set and self.output_scaling != "none":
            raise ConfigError(
                f'{BLOCK}.output_scaling: got "{self.output_scaling}" with masking "backward"; takes "none" there, as '
                "the forward pass is the full model's"
            )
        if self.overlap_refresh and self.masking != "backward":
            raise ConfigError(
                f'{BLOCK}.overlap_refresh: got true with masking "{self.masking}"; takes masking "backward", where '
                "ranks hold copies"
            )
        if self.recompute_frozen and (self.masking, self.granularity) != ("backward", "block"):
            raise ConfigError(
                f'{BLOCK}.recompute_frozen: got true with masking "{self.masking}" and granularity '
                f'"{self.granularity}"; takes masking "backward" and granularity "block", where whole blocks are frozen'
            )
        if self.block_unit is not None and self.granularity != "block":
            raise ConfigError(
                f'{BLOCK}.block_unit: got "{self.block_unit}" with granularity "{self.granularity}"; takes none, or '
                'granularity "block"'
            )
        if self.effective_block_unit == "layer" and set(self.partition) != {"mlp", "attention"}:
            raise ConfigError(
                f"{BLOCK}.partition: got {list(self.partition)} with whole layers as units; takes both kinds, or "
                'block_unit "branch"'
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
    def effective_block_unit(self) -> Literal["layer", "branch"] | None:
        """What a block is; ``None`` at neuron granularity."""
        return (self.block_unit or "layer") if self.granularity == "block" else None

    @classmethod
    def parse(cls, block: Mapping[str, Any]) -> Self:
        """Validate a plain dict.

        Raises:
            ConfigError: unknown key, impossible value, contradicting values, or a feature that is not built yet.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(f"{BLOCK}: got {type(block).__name__}; takes an object with keys, see the README")
        # In a DeepSpeed config "auto" leaves a value to others: here, to the default.
        block = {key: value for key, value in block.items() if value != "auto"}
        try:
            config = cls.model_validate(block)
        except ValidationError as error:
            # A union reports once per member, so messages can repeat.
            messages: dict[str, None] = {}
            for item in error.errors(include_url=False):
                messages[_describe(item, block)] = None
                if len(messages) == _MAX_MESSAGES:
                    break
            raise ConfigError("\n".join(messages)) from None
        for key, built, feature in _NOT_BUILT:
            if getattr(config, key) not in built:
                takes = " or ".join(json.dumps(value) for value in built)
                raise ConfigError(
                    f"{BLOCK}.{key}: got {json.dumps(getattr(config, key))}; takes {takes} in this version "
                    f"({feature} is not available yet)"
                )
        return config

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

    def of_one_rank(self) -> Self:
        """The block in a world of one rank, which owns every unit whatever the coverage says."""
        return self.model_copy(update={"coverage": 1.0, "owners_per_unit": None})

    def owners(self, num_subnetworks: int) -> int | dict[str, int]:
        """``K`` for ``N`` subnetworks, or ``K`` for every kind of unit.

        Raises:
            ConfigError: the coverage gives no whole ``K``, ``K > N``, or a kind is missing.
        """
        if self.owners_per_unit is not None:
            return self._for_kinds("owners_per_unit", self.owners_per_unit, num_subnetworks, _check_owners)
        if self.coverage is None:
            return self._whole_owners(f"{BLOCK}.coverage", DEFAULT_COVERAGE, num_subnetworks, " (the default)")
        return self._for_kinds("coverage", self.coverage, num_subnetworks, self._whole_owners)

    def _for_kinds(
        self, key: str, value: float | Mapping[Any, float], workers: int, convert: Callable[[str, float, int], int]
    ) -> int | dict[str, int]:
        if not isinstance(value, Mapping):
            return convert(f"{BLOCK}.{key}", value, workers)
        if set(value) != set(self.partition) or self.effective_block_unit == "layer":
            kinds = " and ".join(self.partition)
            takes = "one number" if self.effective_block_unit == "layer" else f"a number for {kinds}"
            raise ConfigError(f"{BLOCK}.{key}: got {json.dumps(value)}; takes {takes}, as these are the kinds of units")
        return {kind: convert(f"{BLOCK}.{key}.{kind}", number, workers) for kind, number in value.items()}

    def capacity(self, num_subnetworks: int) -> tuple[float, ...] | None:
        """``worker_capacity``, which must have one number per worker.

        Raises:
            ConfigError: it has not, or a design is asked for that cannot follow it.
        """
        if self.worker_capacity is not None and len(self.worker_capacity) != num_subnetworks:
            raise ConfigError(
                f"{BLOCK}.worker_capacity: got {len(self.worker_capacity)} numbers; takes one for each of the "
                f"{num_subnetworks} subnetworks"
            )
        return self.worker_capacity

    def owner_sets_bound(self, num_subnetworks: int, backend: str) -> int:
        """``max_owner_sets`` of a job of so many subnetworks whose collectives run on ``backend``.

        Each is a communicator, which costs memory, a stream and a thread but on gloo. 16 sets come near the best plan
        for up to 8 workers; more workers are asked for, and get two turns of windows at least.
        """
        if self.max_owner_sets is not None:
            return self.max_owner_sets
        return 64 if backend == "gloo" else min(64, max(16, 2 * num_subnetworks))

    def _whole_owners(self, key: str, value: float, workers: int, note: str = "") -> int:
        # 0.3333 stands for 1/3: the nearest fraction with denominator N counts if it is as close as a float is typed.
        owners = round(value * workers)
        if owners < 1 or abs(value - owners / workers) > 1e-3 * value:
            # The nearest ones where there are many.
            first = max(1, min(owners - _SHOWN_FRACTIONS // 2, workers - _SHOWN_FRACTIONS + 1))
            last = min(workers, first + _SHOWN_FRACTIONS - 1)
            takes = ", ".join(str(Fraction(k, workers)) for k in range(first, last + 1))
            raise ConfigError(
                f"{key}: got {value:g}{note} with {workers} subnetworks, which gives {value * workers:g} owners per "
                f"unit; takes a whole number of owners: {takes}"
                + (", ..." if workers > _SHOWN_FRACTIONS else "")
                + ("" if self.num_subnetworks else f"; or another num_subnetworks (default: {_DEFAULT_SUBNETWORKS})")
            )
        return owners


_DEFAULT_SUBNETWORKS = f"the largest divisor of the world size up to {_MOST_DEFAULT_SUBNETWORKS}"


def default_subnetworks(world_size: int) -> int:
    """``N`` where nobody says: the largest divisor of the world size up to 8."""
    return max(n for n in range(1, _MOST_DEFAULT_SUBNETWORKS + 1) if world_size % n == 0)


def default_bucket_numel(backend: str, world_size: int) -> int:
    """Elements of the full model in a round of gradients, or a portion of weights, where a job does not say.

    DeepSpeed's own default is larger than most models: nothing would overlap. On a CPU smaller pieces also stay in
    reach of the allocator (measured by benchmarks/engine_speed.py). Above 64 ranks pieces grow with the world, as the
    latency of a ring does (docs/scale.md), up to DeepSpeed's default.
    """
    return 5_000_000 if backend == "gloo" else min(500_000_000, 25_000_000 * max(64, world_size) // 64)


def _check_owners(key: str, value: float, workers: int) -> int:
    if value > workers:
        raise ConfigError(f"{key}: got {value} with {workers} subnetworks; takes 1 to {workers}")
    return int(value)


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


def read_block(source: Mapping[str, Any] | str | Path, key: str) -> Any:
    """The block as it is written in a dict or file, which may wrap it under ``"subnetwork_data_parallel"``.

    Raises:
        ConfigError: see :func:`read_json`.
    """
    block: Any = read_json(source, key) if isinstance(source, str | Path) else source
    return block[BLOCK] if isinstance(block, Mapping) and set(block) == {BLOCK} else block


def read_json(path: str | Path, key: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: names ``key`` and the file when it is missing, unreadable, too large, or holds no JSON object.
    """
    try:
        value = parse_json(read_json_text(Path(path)))
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {path} {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {path} holds a {type(value).__name__}; takes a JSON object")
    return value


_UNIONS = {
    "coverage": 'a number above 0 and up to 1, as 0.5 or "1/2", or one for each kind of unit (mlp, attention)',
    "owners_per_unit": "a whole number from 1 on, or one for each kind of unit (mlp, attention)",
}


def _describe(item: Any, block: Mapping[str, Any]) -> str:
    raised = item.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        return str(raised)
    name = str(item["loc"][0]) if item["loc"] else ""
    if name in _UNIONS:
        return f"{BLOCK}.{name}: got {shown(block[name])}; takes {_UNIONS[name]}"
    key = ".".join(str(part)[:_LONGEST_KEY] for part in item["loc"])
    got = shown(item.get("input"))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, SDPConfig.model_fields, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if key == "reduction_dtype":
            hint = 'takes "communication_data_type" of the DeepSpeed config in its place; this block '
        return f"{BLOCK}.{key}: unknown key, got {got}; {hint}takes {', '.join(SDPConfig.model_fields)}"
    return f"{BLOCK}.{key}: got {got}; {item['msg'][0].lower()}{item['msg'][1:]}"
