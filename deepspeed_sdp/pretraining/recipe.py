"""A recipe: one DeepSpeed config that says all of a pretraining run, its model and length included."""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepspeed_sdp.config import BLOCK, SDPConfig, read_json
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.json_text import parse_json, shown
from deepspeed_sdp.presets import model_path

PRETRAINING = "pretraining"
# What a recipe falls into on the command line, ``--sdp.coverage 1/4``: the keys that lead to it in the file.
SECTIONS = {"pretraining": (PRETRAINING,), "sdp": (BLOCK,), "deepspeed": ()}
FOLDER = Path(__file__).parents[1] / "recipes"
# Steps, sequences.
_MOST = 1 << 60
_MOST_BATCH = 1 << 31
_AUTO_STEPS = ("total_num_steps", "warmup_num_steps")
# Top-level keys of a DeepSpeed config (its documentation's, and those of its config classes).
_DEEPSPEED_KEYS = frozenset(
    re.findall(
        r"\w+",
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler "
        "communication_data_type seq_parallel_communication_data_type prescale_gradients "
        "gradient_predivide_factor sparse_gradients fp16 bf16 bfloat16 amp torch_autocast gradient_clipping "
        "zero_optimization zero_force_ds_cpu_optimizer zero_allow_untested_optimizer steps_per_print "
        "wall_clock_breakdown memory_breakdown dump_state disable_allgather graph_harvesting "
        "dataloader_drop_last use_data_before_expert_parallelism activation_checkpointing flops_profiler aio "
        "autotuning elasticity comms_logger tensorboard wandb monitor_config csv_monitor comet "
        "compression_training data_efficiency data_types checkpoint compile hybrid_engine nebula pipeline "
        "timers tensor_parallel sparse_attention curriculum_learning eigenvalue progressive_layer_drop "
        "load_universal_checkpoint ",
    )
)


class Pretraining(BaseModel):
    """The block ``"pretraining"`` of a recipe. Every error names the key, what it got and what it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str = Field(description="HuggingFace config.json, a folder with one, or a preset")
    seq_length: int = Field(ge=2, le=1 << 24, description="tokens of one training sequence")
    tokens: float = Field(ge=1, le=1e18, description="training tokens of the dense baseline, over all ranks")
    match: Literal["tokens", "flops"] = Field(
        "tokens", description="as many tokens as the dense baseline, or as many as its FLOPs allow"
    )
    warmup_fraction: float = Field(0.02, ge=0, lt=1, description='share of the steps for "warmup_num_steps": "auto"')
    document_reset: Literal["none", "positions", "attention"] = Field(
        "none", description="what begins anew at each document of a sequence, besides the end-of-sequence token before"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="order of the training sequences")
    activation_checkpointing: bool = Field(
        False, description="compute each layer's activations again in the backward pass"
    )
    log_interval: int = Field(10, ge=1, le=_MOST, description="steps between two lines of metrics")
    eval_interval: int = Field(200, ge=1, le=_MOST, description="steps between evaluations of the full model")
    eval_sequences: int = Field(
        256, ge=0, le=_MOST, description="held-out sequences of an evaluation in mid-run; 0: all"
    )
    checkpoint_interval: int = Field(
        200, ge=0, le=_MOST, description="steps between checkpoints; 0: only when asked to stop"
    )


def recipe_names() -> list[str]:
    """Of the recipes that come with the package, smallest first."""
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: (name[-1] == "b", len(name), name))


def recipe_path(recipe: str | Path) -> Path:
    """A file of that name, or else the recipe that comes with the package.

    Raises:
        ConfigError: there is neither.
    """
    own = FOLDER / f"{recipe}.json"
    path = Path(recipe) if Path(recipe).is_file() else own
    if not path.is_file():
        raise ConfigError(f"recipe: {recipe} is no file and no recipe; recipes are {', '.join(recipe_names())}")
    return path


class Recipe:
    """A recipe that has been read.

    Attributes:
        path: of the file.
        title: the recipe and what was changed, as on a command line.
        about: its block ``"pretraining"``.
        ds_config: the rest, a DeepSpeed config with the SDP block; values may still be ``"auto"``.
        sdp: the SDP block, validated; ``enabled`` is false for the dense baseline.
    """

    def __init__(self, path: Path, title: str, about: Pretraining, ds_config: dict[str, Any], sdp: SDPConfig) -> None:
        self.path = path
        self.title = title
        self.about = about
        self.ds_config = ds_config
        self.sdp = sdp

    @property
    def model_file(self) -> Path:
        """The model's config: a path as it stands or beside the recipe, or a preset.

        Raises:
            ConfigError: there is none.
        """
        beside = self.path.parent / self.about.model
        return beside if beside.exists() else model_path(self.about.model, f"{PRETRAINING}.model")

    def describe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What all ranks must have alike; ``options``: of their command lines."""
        return {PRETRAINING: self.about.model_dump(), "recipe": self.ds_config, "option": options}

    def micro_batches(self, world_size: int) -> int:
        """Gradient accumulation steps that ``train_batch_size`` takes on ``world_size`` ranks.

        Raises:
            ConfigError: it cannot be reached.
        """
        batch, micro = (self.ds_config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu"))
        if batch % (micro * world_size):
            raise ConfigError(
                f"train_batch_size: got {batch} with {world_size} ranks and train_micro_batch_size_per_gpu {micro}; "
                f"takes a multiple of {micro * world_size} (--deepspeed.train_micro_batch_size_per_gpu changes it)"
            )
        return int(batch // (micro * world_size))

    def for_steps(self, steps: int) -> dict[str, Any]:
        """The DeepSpeed config of a run of so many steps: the schedule stretches with them."""
        config = copy.deepcopy(self.ds_config)
        params = config.get("scheduler", {}).get("params", {})
        values = {"total_num_steps": steps, "warmup_num_steps": max(1, round(self.about.warmup_fraction * steps))}
        params.update({key: values[key] for key in _AUTO_STEPS if params.get(key) == "auto"})
        return config


def read_recipe(recipe: str | Path, settings: Sequence[tuple[str, str]] = ()) -> Recipe:
    """A recipe by its name or from its file, with ``settings`` such as ``("pretraining.tokens", "1e8")``.

    Raises:
        ConfigError: names the file and key that is missing, unknown or impossible.
    """
    path = recipe_path(recipe)
    data = read_json(path, "recipe")
    for name, text in settings:
        _set(data, name, text)
    block = data.pop(PRETRAINING, None)
    if not isinstance(block, Mapping):
        raise ConfigError(
            f'recipe: {path} has no block "{PRETRAINING}"; takes a recipe such as those of "deepspeed-sdp recipes"'
        )
    try:
        about = Pretraining(**{**block, "tokens": _as_float(block.get("tokens"))} if "tokens" in block else block)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(item) for item in error.errors())) from None
    _check_keys(data)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_BATCH:
            raise ConfigError(
                f"{key}: got {shown(value)}; takes a whole number from 1 on, up to {_MOST_BATCH}, in a recipe"
            )
    sdp_block = data.get(BLOCK)
    if sdp_block is None:
        raise ConfigError(f'recipe: {path} has no block "{BLOCK}"; the dense baseline says {{"enabled": false}}')
    sdp = SDPConfig.parse(sdp_block).at_length(about.seq_length)
    # The engine reads it from here.
    data[BLOCK] = {**sdp_block, "plan": sdp.plan.model_dump(mode="json", exclude_unset=True)}
    title = " ".join([str(recipe), *(f"--{name} {text}" for name, text in settings)])
    return Recipe(path, title, about, data, sdp)


def _check_keys(data: Mapping[str, Any]) -> None:
    """DeepSpeed lets keys that it does not know through, so a mistyped one would do nothing."""
    known = {*_DEEPSPEED_KEYS, BLOCK}
    for key, value in data.items():
        if key not in known:
            inside = [name for name in _inner_names() if name.endswith(f".{key}")]
            near = inside or difflib.get_close_matches(key, [*known, PRETRAINING], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key}: got {shown(value)}; takes no such key at the top of a recipe{hint}")
    if "gradient_accumulation_steps" in data:
        raise ConfigError(
            f"gradient_accumulation_steps: got {shown(data['gradient_accumulation_steps'])}; takes none in a "
            "recipe, it follows from train_batch_size and the number of ranks"
        )
    if "scheduler" in data:
        scheduler = data["scheduler"]
        if not isinstance(scheduler, Mapping) or not isinstance(scheduler.get("type"), str):
            raise ConfigError(f'scheduler: got {shown(scheduler)}; takes an object with "type" and "params"')
        params = scheduler.get("params", {})
        if not isinstance(params, Mapping):
            raise ConfigError(f"scheduler.params: got {shown(params)}; takes an object")
        for key, value in params.items():
            if value == "auto" and key not in _AUTO_STEPS:
                raise ConfigError(
                    f'scheduler.params.{key}: got "auto"; takes that for {" and ".join(_AUTO_STEPS)} alone'
                )


def _inner_names() -> list[str]:
    return [f"{PRETRAINING}.{key}" for key in Pretraining.model_fields] + [
        f"{BLOCK}.{key}" for key in SDPConfig.model_fields
    ]


def _set(data: dict[str, Any], name: str, text: str) -> None:
    section, *keys = name.split(".")
    if section not in SECTIONS or not all(keys):
        near = difflib.get_close_matches(section, SECTIONS, n=1) or ["deepspeed"] * (section in _DEEPSPEED_KEYS)
        rest = ".".join(keys if near != ["deepspeed"] else [section, *keys])
        hint = f"; did you mean --{near[0]}.{rest}?" if near else ""
        raise ConfigError(f"--{name}: got {text!r}; takes a section {', '.join(SECTIONS)} and a key of it{hint}")
    keys = [*SECTIONS[section], *keys]
    for i, key in enumerate(keys[:-1]):
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--{name}: got {text!r}; {'.'.join(keys[: i + 1])} is no block")
    try:
        data[keys[-1]] = parse_json(text)
    except ValueError:
        data[keys[-1]] = text


def _as_float(value: Any) -> Any:
    """Beyond the largest float it stays what it is, and is refused."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000
    return float(value) if is_number else value


def _describe(item: Any) -> str:
    key = ".".join([PRETRAINING, *(str(part) for part in item["loc"])])
    got = shown(item.get("input"))
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key, got {got}; takes {', '.join(Pretraining.model_fields)}"
    if item["type"] == "missing":
        return f"{key}: got nothing; takes {Pretraining.model_fields[item['loc'][0]].description}"
    return f"{key}: got {got}; {item['msg'][0].lower()}{item['msg'][1:]}"
