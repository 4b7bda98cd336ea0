"""A run, from a recipe, one file that says all of it, or from the files that ``launch/train.py`` is given."""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepspeed_sdp.config import BLOCK, SDPConfig, in_words, read_block, read_json, say_total_steps
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.json_text import parse_json, shown
from deepspeed_sdp.presets import model_path
from deepspeed_sdp.pretraining.schema import (
    DEEPSPEED,
    SECTIONS,
    SOURCES,
    DataSection,
    LengthSection,
    LoggingSection,
    ModelSection,
    RunSchema,
    fields,
    kinds,
    without_other_sources,
)

FOLDER = Path(__file__).parents[1] / "recipes"
# A key of a run and its value as it was typed, several words of a list.
Setting = tuple[str, str | list[str]]
_MOST_BATCH = 1 << 31
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
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


def recipe_names() -> list[str]:
    """Of the recipes that come with the package, smallest first."""
    names = [path.stem for path in FOLDER.glob("*.json")]
    return sorted(names, key=lambda name: (name != "demo", name[-1] == "b", len(name), name))


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


@dataclass(frozen=True)
class Run:
    """A run whose settings have been read.

    Attributes:
        model, data, length, logging: see the schema.
        sdp: the SDP block, at the run's length; ``enabled`` is false for the dense baseline.
        ds_config: a DeepSpeed config with the SDP block; of the schedule's values some may still be ``"auto"``.
        title: where it is from and what was changed, as on a command line.
        folder: of the recipe, where its model may lie.
    """

    model: ModelSection
    data: DataSection
    length: LengthSection
    logging: LoggingSection
    sdp: SDPConfig
    ds_config: dict[str, Any]
    title: str
    folder: Path

    @property
    def model_file(self) -> Path:
        """The model's config: a path as it stands or beside the recipe, or a preset.

        Raises:
            ConfigError: there is none.
        """
        beside = self.folder / self.model.path
        return beside if beside.exists() else model_path(self.model.path, "model.path")

    def describe(self) -> dict[str, Any]:
        """What all ranks must have alike."""
        sections = {name: getattr(self, name).model_dump() for name in ("model", "data", "length", "logging")}
        ds_config = {key: value for key, value in self.ds_config.items() if key != BLOCK}
        return {**sections, BLOCK: self.sdp.written(), DEEPSPEED: ds_config}

    def micro_batches(self, world_size: int) -> int:
        """Gradient accumulation steps on ``world_size`` ranks.

        Raises:
            ConfigError: the batch sizes do not fit each other or the ranks.
        """
        return self._batch(world_size)[2]

    def micro_batch(self, world_size: int) -> int:
        """Sequences of a micro-batch on one rank. Raises: see :meth:`micro_batches`."""
        return self._batch(world_size)[1]

    def global_batch(self, world_size: int) -> int:
        """Sequences of an optimizer step on all ranks. Raises: see :meth:`micro_batches`."""
        return self._batch(world_size)[0]

    def _batch(self, world_size: int) -> tuple[int, int, int]:
        """As DeepSpeed derives what is not said."""
        # One of the first two is there.
        batch, micro, steps = (self.ds_config.get(key) for key in _BATCH_KEYS)
        if batch is None:
            assert micro is not None
            return micro * (steps or 1) * world_size, micro, steps or 1
        micro = micro or batch // (world_size * (steps or 1)) or 1
        found = batch // (micro * world_size)
        if batch % (micro * world_size) or (steps or found) != found:
            each = f"{micro}" if steps is None else f"{micro} and gradient_accumulation_steps {steps}"
            takes = f"a multiple of {micro * world_size}" if steps is None else f"{micro * world_size * steps}"
            raise ConfigError(
                f"train_batch_size: got {batch} with {world_size} ranks and train_micro_batch_size_per_gpu {each}; "
                f"takes {takes} (--deepspeed.train_micro_batch_size_per_gpu changes it)"
            )
        return batch, micro, found

    def for_steps(self, steps: int) -> dict[str, Any]:
        """The DeepSpeed config of a run of so many steps: schedules stretch with them."""
        config = copy.deepcopy(self.ds_config)
        params = config.get("scheduler", {}).get("params", {})
        values = {"total_num_steps": steps, "warmup_num_steps": max(1, round(self.length.warmup_fraction * steps))}
        params.update({key: values[key] for key in _AUTO_STEPS if params.get(key) == "auto"})
        say_total_steps(config, steps)
        return config


def read_recipe(recipe: str | Path, settings: Sequence[Setting] = ()) -> Run:
    """A recipe by its name or from its file, with ``settings`` such as ``("length.tokens", "1e8")``.

    Raises:
        ConfigError: names the file and key that is missing, unknown or impossible.
    """
    path = recipe_path(recipe)
    data = read_json(path, "recipe")
    if not set(data) & {"model", "length", DEEPSPEED}:
        raise ConfigError(
            f'recipe: {path} has no sections "model", "length" and "{DEEPSPEED}"; takes a recipe such as those of '
            '"deepspeed-sdp recipes"'
        )
    return make_run(data, settings, str(recipe), path.parent)


def run_of_files(
    deepspeed_config: str | Path, sdp_config: str | Path | None, settings: Sequence[Setting], title: str
) -> Run:
    """A run of a DeepSpeed config and an SDP block, inside it or in another file; all else is in ``settings``.

    Raises:
        ConfigError: names the file and key.
    """
    ds_config = read_json(deepspeed_config, "--deepspeed_config")
    if sdp_config is not None and BLOCK in ds_config:
        raise ConfigError(f'two SDP blocks: --sdp_config is given and the DeepSpeed config holds "{BLOCK}"; takes one')
    block = ds_config.pop(BLOCK, None) if sdp_config is None else read_block(sdp_config, "--sdp_config")
    data = {"model": {}, "length": {}, BLOCK: block, DEEPSPEED: ds_config}
    if block is None:
        raise ConfigError(f'no SDP block: takes --sdp_config, or "{BLOCK}" in the DeepSpeed config')
    title = " ".join([title, *map(str, filter(None, (deepspeed_config, sdp_config)))])
    return make_run(data, settings, title, Path())


def make_run(sections: Mapping[str, Any], settings: Sequence[Setting], title: str, folder: Path) -> Run:
    """A run from its ``sections``, with ``settings``; ``title`` and ``folder``: see :class:`Run`.

    Raises:
        ConfigError: names the key.
    """
    data: dict[str, Any] = copy.deepcopy(dict(sections))
    sources = [name for name, _ in settings if name in {f"data.{source}" for source in SOURCES}]
    if sources and isinstance(data.get("data"), dict):
        data["data"] = without_other_sources(data["data"], sources[-1].removeprefix("data."))
    for name, value in settings:
        _set(data, name, value)
    if data.get(BLOCK) is None:
        raise ConfigError(
            f'{BLOCK}: got nothing; takes the SDP block, which for the dense baseline is {{"enabled": false}}'
        )
    block = data[BLOCK]
    sdp = SDPConfig.parse(block)
    try:
        run = RunSchema.model_validate({**data, BLOCK: sdp})
    except ValidationError as error:
        raise ConfigError(in_words(error, "", RunSchema, data)) from None
    if run.length.tokens is None and run.length.steps is None:
        raise ConfigError("length: got neither tokens nor steps; takes one")
    _check_deepspeed(run.deepspeed)
    sdp = sdp.at_length(run.data.seq_length)
    # The engine reads it from here.
    ds_config = {**run.deepspeed, BLOCK: {**block, "plan": sdp.plan.model_dump(mode="json", exclude_unset=True)}}
    title = " ".join([title, *(_typed(name, value) for name, value in settings)])
    return Run(run.model, run.data, run.length, run.logging, sdp, ds_config, title, folder)


def _typed(name: str, value: str | list[str]) -> str:
    return f"--{name} {value if isinstance(value, str) else ' '.join(value)}"


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    """DeepSpeed lets keys that it does not know through, so a mistyped one would do nothing."""
    for key, value in config.items():
        if key == BLOCK:
            raise ConfigError(f'{DEEPSPEED}.{BLOCK}: got {shown(value)}; takes it beside "{DEEPSPEED}", not inside')
        if key not in _DEEPSPEED_KEYS:
            inside = [name for name, _ in fields() if name.endswith(f".{key}")]
            near = inside or [f"{DEEPSPEED}.{name}" for name in difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1)]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{DEEPSPEED}.{key}: got {shown(value)}; takes no such key{hint}")
    for key in _BATCH_KEYS:
        value = config.get(key)
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_BATCH
        ):
            raise ConfigError(
                f"{DEEPSPEED}.{key}: got {shown(value)}; takes a whole number from 1 on, up to {_MOST_BATCH}"
            )
    if all(config.get(key) is None for key in _BATCH_KEYS[:2]):
        raise ConfigError(f"{DEEPSPEED}: got neither {_BATCH_KEYS[0]} nor {_BATCH_KEYS[1]}; takes one or both")
    if "scheduler" in config:
        _check_scheduler(config["scheduler"])


def _check_scheduler(scheduler: Any) -> None:
    if not isinstance(scheduler, Mapping) or not isinstance(scheduler.get("type"), str):
        raise ConfigError(f'{DEEPSPEED}.scheduler: got {shown(scheduler)}; takes an object with "type" and "params"')
    params = scheduler.get("params", {})
    if not isinstance(params, Mapping):
        raise ConfigError(f"{DEEPSPEED}.scheduler.params: got {shown(params)}; takes an object")
    for key, value in params.items():
        if value == "auto" and key not in _AUTO_STEPS:
            raise ConfigError(
                f'{DEEPSPEED}.scheduler.params.{key}: got "auto"; takes that for {" and ".join(_AUTO_STEPS)} alone'
            )


def _set(data: dict[str, Any], name: str, value: str | list[str]) -> None:
    section, *keys = name.split(".")
    sections = {**SECTIONS, DEEPSPEED: DEEPSPEED}
    if section not in sections or not keys or not all(keys):
        near = difflib.get_close_matches(section, sections, n=1) or [DEEPSPEED] * (section in _DEEPSPEED_KEYS)
        rest = ".".join(keys if near != [DEEPSPEED] else [section, *keys])
        hint = f"; did you mean --{near[0]}.{rest}?" if near else ""
        raise ConfigError(f"--{name}: got {value!r}; takes a section {', '.join(sections)} and a key of it{hint}")
    keys = [sections[section], *keys]
    for i, key in enumerate(keys[:-1]):
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--{name}: got {value!r}; {'.'.join(keys[: i + 1])} is no block")
    data[keys[-1]] = _value(name, value)


def _value(name: str, typed: str | list[str]) -> Any:
    """What was typed, as JSON where that is what the key takes."""
    known: set[Any] = next((kinds(field.annotation) for key, field in fields() if key == name), set())
    words = typed if isinstance(typed, list) else [typed]
    is_text = str in known
    if tuple in known and not (len(words) == 1 and words[0].startswith("[")):
        return words if is_text else [_parsed(word) for word in words]
    word = " ".join(words)
    is_plain = is_text and tuple not in known and word not in ("null", "auto") and not word.startswith('"')
    return word if is_plain else _parsed(word)


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text
