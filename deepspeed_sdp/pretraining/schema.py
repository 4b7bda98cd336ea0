"""What a run is: one schema for recipes, command lines, their help, errors, and editors (``recipes schema``)."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from deepspeed_sdp.config import BLOCK, SDPConfig, block_of
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.json_text import shown

# Steps, sequences.
_MOST = 1 << 60
# By a stream, which has many documents, and by a text that is prepared.
STREAM_HELDOUT, TEXT_HELDOUT = 0.005, 0.05

OnFault = Literal["skip", "stop"]


def _as_float(value: Any) -> Any:
    """Beyond the largest float it stays what it is, and is refused."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000
    return float(value) if is_number else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Number = Annotated[float, BeforeValidator(_as_float)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Weights = Annotated[tuple[Annotated[Number, Field(gt=0, le=1e9)], ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """``model``: what is trained."""

    path: str = Field(description="HuggingFace config.json, a folder with one, or a preset such as llama-134m")
    activation_checkpointing: bool = Field(
        False, description="compute each layer's activations again in the backward pass"
    )


SOURCES = ("path", "stream", "text")
# What only some sources take.
_OF_SOURCES = {
    **dict.fromkeys(("weights", "num_lanes"), ("stream",)),
    **dict.fromkeys(("vocab_size", "cache"), ("text",)),
    **dict.fromkeys(
        (
            "tokenizer",
            "heldout_fraction",
            "hub_config",
            "hub_revision",
            "text_column",
            "on_broken_row",
            "on_broken_file",
            "retries",
        ),
        ("stream", "text"),
    ),
}


class DataSection(_Section):
    """``data``: on what. One of ``path``, ``stream`` and ``text`` says where it is from."""

    path: str | None = Field(
        None, description="folder of tokenised shards that deepspeed-sdp data made; visible to all nodes"
    )
    stream: Names | None = Field(
        None,
        description="tokenised on the fly: hub:OWNER/NAME, or .parquet, .jsonl (.gz, .zst), .txt and .ds files or "
        "their folders",
    )
    text: Names | None = Field(
        None,
        description="tokenised before the start, small: the same files, or "
        "builtin, Python's own documentation (builtin:20 for 20 MB of it, not 8)",
    )
    seq_length: int = Field(256, ge=2, le=1 << 24, description="tokens of one training sequence")
    seed: int = Field(
        0, ge=0, lt=1 << 63, description="order of the training sequences; initial weights follow the SDP block's seed"
    )
    document_reset: Literal["none", "positions", "attention"] = Field(
        "none", description="what begins anew at each document of a sequence, besides the end-of-sequence token before"
    )
    tokenizer: str | None = Field(
        None,
        description="of a stream or text: folder or hub name of a HuggingFace tokenizer; default: one is trained on "
        "the text",
    )
    heldout_fraction: Number | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the documents held out for validation; default: "
        f"{STREAM_HELDOUT} of a stream, {TEXT_HELDOUT} of a text",
    )
    vocab_size: int | None = Field(
        None, ge=1, le=1 << 31, description="of the tokenizer that is trained on a text; default: 4096"
    )
    cache: str | None = Field(None, description="prepared text; default: OUTPUT_DIR/data. Must be visible to all nodes")
    weights: Weights | None = Field(
        None,
        description="of the paths of a stream, one for each, in any unit: shares of the tokens; each path is then a "
        "source of its own. Default: all of them are one source",
    )
    hub_config: str | None = Field(None, description="of a data set of the hub, e.g. sample-10BT")
    hub_revision: str | None = Field(None, description="of a data set of the hub; best a commit")
    text_column: str | None = Field(None, description="default: text")
    on_broken_row: OnFault | None = Field(None, description="default: skip, and count")
    on_broken_file: OnFault | None = Field(None, description="default: stop")
    retries: int | None = Field(None, ge=0, le=1 << 31, description="of a connection that is lost; default: 8")
    num_lanes: int | None = Field(
        None,
        ge=1,
        le=1 << 31,
        description="parts in which a stream is read: a multiple of the ranks that divides the global batch; fewer for "
        "a small source; default: the most up to 64. A run goes on with those it began with",
    )

    @property
    def source(self) -> str | None:
        """Which of the three it is."""
        return next((name for name in SOURCES if getattr(self, name) is not None), None)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"data: got {' and '.join(given)}; takes one of {', '.join(SOURCES)}")
        for name, sources in _OF_SOURCES.items():
            # Without a source it is said for one to come, on the command line.
            if given and getattr(self, name) is not None and given[0] not in sources:
                raise ConfigError(
                    f"data.{name}: got {shown(getattr(self, name))} with data.{given[0]}; takes it with "
                    f"data.{' or data.'.join(sources)} alone"
                )
        if self.stream is not None and self.tokenizer is None:
            raise ConfigError(
                "data.tokenizer: got nothing with data.stream; takes a HuggingFace tokenizer, a folder or hub name"
            )
        if self.weights is not None and self.stream is not None and len(self.weights) != len(self.stream):
            raise ConfigError(
                f"data.weights: got {len(self.weights)} weights; takes one for each of the {len(self.stream)} paths of "
                "data.stream"
            )
        return self


def without_other_sources(data: dict[str, Any], source: str) -> dict[str, Any]:
    """The section ``data`` with its place free for another ``source``: what it says of others is left out."""
    return {
        key: value for key, value in data.items() if key not in SOURCES and source in _OF_SOURCES.get(key, (source,))
    }


class LengthSection(_Section):
    """``length``: how long. ``tokens`` or ``steps``; ``steps`` counts where both are said."""

    tokens: Number | None = Field(
        None, ge=1, le=1e18, description="training tokens of the dense baseline, over all ranks, e.g. 1e9"
    )
    steps: int | None = Field(
        None, ge=1, le=_MOST, description="optimizer steps, instead of those that follow from tokens"
    )
    match: Literal["tokens", "flops"] = Field(
        "tokens", description="as many tokens as the dense baseline, or as many as its FLOPs allow"
    )
    warmup_fraction: Number = Field(
        0.02, ge=0, lt=1, description='share of the steps for "warmup_num_steps": "auto" of the schedule'
    )


class LoggingSection(_Section):
    """``logging``: what is measured, shown and saved meanwhile."""

    log_interval: int = Field(10, ge=1, le=_MOST, description="steps between two lines of metrics")
    eval_interval: int = Field(50, ge=1, le=_MOST, description="steps between evaluations of the full model")
    eval_sequences: int = Field(
        128, ge=0, le=_MOST, description="held-out sequences of an evaluation in mid-run; 0: all; the last takes all"
    )
    checkpoint_interval: int = Field(
        0, ge=0, le=_MOST, description="steps between checkpoints; 0: only when SIGTERM or SIGUSR1 asks the job to stop"
    )
    compare_dense: bool = Field(
        False,
        description="at the end, measure the dense model's state under the same DeepSpeed config; needs the memory for "
        "it",
    )
    peak_tflops: Number | None = Field(
        None, gt=0, le=1e9, description="matmul TFLOPS of the device, for the MFU; default: by the device's name"
    )
    tensorboard: bool = Field(False, description="figures to OUTPUT_DIR/tensorboard too")
    wandb: str | None = Field(None, description="project of Weights & Biases that gets the figures too")


class RunSchema(BaseModel):
    """A recipe's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="A run of deepspeed-sdp pretrain")

    editor: str | None = Field(None, alias="$schema", description="for editors: where this schema is")
    model: ModelSection = Field(description="what is trained")
    data: DataSection = Field(default_factory=DataSection, description="on what")
    length: LengthSection = Field(description="how long")
    logging: LoggingSection = Field(
        default_factory=LoggingSection, description="what is measured, shown and saved meanwhile"
    )
    subnetwork_data_parallel: SDPConfig = Field(description='the SDP block; {"enabled": false}: the dense baseline')
    deepspeed: dict[str, Any] = Field(description="a DeepSpeed config: batch, optimizer, precision, ZeRO, schedule")


# What a part of the file is called on the command line.
SECTIONS = {"model": "model", "data": "data", "length": "length", "logging": "logging", "sdp": BLOCK}
DEEPSPEED = "deepspeed"


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every value of a run but those of the DeepSpeed config: as on the command line, ``data.seq_length``."""
    for section, key in SECTIONS.items():
        yield from _fields(RunSchema.model_fields[key].annotation, f"{section}.")


def _fields(model: Any, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if (block := block_of(field.annotation)) is not None:
            yield from _fields(block, f"{prefix}{name}.")
        else:
            yield prefix + (field.alias or name), field


def choices(annotation: Any) -> list[str]:
    """The values of a choice, or of a list's items; of anything else, none."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(inner)
    return [choice for part in inner if get_origin(part) is not dict for choice in choices(part)]


def kinds(annotation: Any) -> set[Any]:
    """The types that a value can have: ``{str, NoneType}`` of ``str | None``; of a choice, those of its values.

    Of a list, ``tuple`` and the types of its items.
    """
    if hasattr(annotation, "__metadata__"):
        return kinds(annotation.__origin__)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in inner}
    if origin is tuple:
        return {tuple, *kinds(inner[0])}
    if origin is dict:
        return {dict}
    return set().union(*map(kinds, inner)) if inner else {annotation}
