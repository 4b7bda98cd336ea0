"""``transformers.Trainer`` with SDP: what it evaluates and saves is the full model."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import Trainer
from transformers.utils import logging

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.checkpoint import has_checkpoint, model_folder
from deepspeed_sdp.config import BLOCK, say_total_steps
from deepspeed_sdp.engine import SDPEngine
from deepspeed_sdp.errors import ConfigError, OutputError
from deepspeed_sdp.failures import report_uncaught
from deepspeed_sdp.files import remove_folder, remove_unfinished
from deepspeed_sdp.ranks import meet

logger = logging.get_logger(__name__)

Original = Callable[..., Any]


def sdp_engine(trainer: Trainer) -> SDPEngine | None:
    """The engine of a trainer that trains with SDP; ``None`` before ``train`` and without SDP."""
    engine = getattr(trainer, "deepspeed", None)
    return engine if isinstance(engine, SDPEngine) else None


def asks_for_sdp(trainer: Trainer) -> bool:
    """Whether its DeepSpeed config has an SDP block that is not switched off."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    block = plugin.deepspeed_config.get(BLOCK) if plugin is not None else None
    return block is not None and not (isinstance(block, Mapping) and block.get("enabled") is False)


def evaluation_loop(trainer: Trainer, original: Original, *args: Any, **kwargs: Any) -> Any:
    """``evaluate`` and ``predict`` see the full model, which every rank has, or calls, for as long as they take."""
    engine = sdp_engine(trainer)
    if engine is not None:
        _calibrate(trainer, engine)
        is_streamed = {"gathered": False, "streamed": True, "auto": None}[engine.sdp_config.evaluation]
        with engine.full_model(is_streamed) as model, _stands_for(trainer, model):
            return original(*args, **kwargs)
    if not asks_for_sdp(trainer):
        return original(*args, **kwargs)
    # Before training nothing is cut, and there is no engine to build.
    own: Any = trainer.model
    if any(parameter.is_meta for parameter in own.parameters()):
        raise ConfigError(
            "evaluate: got a model on the meta device before training; takes one in memory, or evaluate after training"
        )
    # Trainer casts what it evaluates; training begins from the model as it is.
    is_cast = trainer.args.bf16_full_eval or trainer.args.fp16_full_eval
    trainer.is_deepspeed_enabled = False
    try:
        with _stands_for(trainer, (copy.deepcopy(own) if is_cast else own).to(trainer.args.device)):
            return original(*args, **kwargs)
    finally:
        trainer.is_deepspeed_enabled = True
        # What was prepared for evaluation is not what training prepares.
        trainer.accelerator._models.clear()


def save_model(
    trainer: Trainer, original: Original, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """The folder holds the full model, as Trainer without SDP would have written it."""
    engine = sdp_engine(trainer)
    if engine is None:
        original(output_dir, _internal_call)
        return
    _calibrate(trainer, engine)
    weights = engine.full_state_dict()
    folder = Path(output_dir or str(trainer.args.output_dir))

    def write() -> None:
        assert weights is not None
        skeleton = engine.full_skeleton(next(iter(weights.values())).dtype)
        try:
            with model_folder(folder) as staging, _stands_for(trainer, skeleton):
                trainer._save(str(staging), state_dict=weights)
        except (OSError, SafetensorError) as error:  # the latter is what a full disk gives
            raise OutputError(
                f"save_model: cannot write {folder}: {getattr(error, 'strerror', None) or error}"
            ) from None

    from_first_rank(write)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def training_step(trainer: Trainer, original: Original, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """What the last step was trained on is kept: the full model is calibrated on it."""
    engine = sdp_engine(trainer)
    if engine is not None and isinstance(inputs, Mapping):
        kept = trainer.__dict__.setdefault("_sdp_inputs", deque(maxlen=trainer.args.gradient_accumulation_steps))
        kept.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        trainer.__dict__["_sdp_inputs_of"] = engine.global_steps + 1
    return original(model, inputs, *args, **kwargs)


def _calibrate(trainer: Trainer, engine: SDPEngine) -> None:
    """Once per step, before the full model is seen; without labels there is no loss to go by.

    Not after a checkpoint was loaded, whose model shall be what it was.
    """
    inputs = list(trainer.__dict__.get("_sdp_inputs", ()))
    if trainer.__dict__.get("_sdp_inputs_of") != engine.global_steps:
        return
    each = dist.get_world_size() * engine.train_micro_batch_size_per_gpu()
    inputs = inputs[: -(-engine.sdp_config.calibration_sequences // each)]
    if inputs and all("labels" in batch for batch in inputs):
        engine.calibrate(inputs)
    del trainer.__dict__["_sdp_inputs_of"]


def floating_point_ops(trainer: Trainer, original: Original, inputs: dict[str, Any]) -> float:
    """Trainer's formula, six per token and weight outside of the embeddings, for the weights that are worked with."""
    engine = sdp_engine(trainer)
    tokens = inputs.get(getattr(trainer.model, "main_input_name", "input_ids"))
    if engine is None or not isinstance(tokens, torch.Tensor):
        return float(original(inputs))
    computed, trained = engine.worked_numel
    return float((4 * computed + 2 * trained) * tokens.numel())


def finalize_training(trainer: Trainer, original: Original, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint that is still being written is complete when ``train`` returns."""
    engine = sdp_engine(trainer)
    if engine is not None:
        engine.wait_for_checkpoint()
        if trainer.args.should_save and _saved_steps(trainer):
            _remove_old_checkpoints(trainer)
        engine.release_checkpoints()
    return original(*args, **kwargs)


def save_checkpoint(trainer: Trainer, original: Original, *args: Any, **kwargs: Any) -> None:
    """No complete ``checkpoint-*`` is removed before a newer one is complete; one that could not be written is."""
    engine, limit = sdp_engine(trainer), trainer.args.save_total_limit
    if engine is not None:
        engine.claim_checkpoints(str(trainer.args.output_dir))
    if engine is None or trainer.args.save_only_model:
        original(*args, **kwargs)
        return
    trainer.args.save_total_limit = None
    try:
        original(*args, **kwargs)
    finally:
        trainer.args.save_total_limit = limit
    # What is written beside the training counts from the next call on.
    meet("a checkpoint of Trainer")
    if trainer.args.should_save:
        step = trainer.state.global_step
        _remove_old_checkpoints(trainer, under_way=step if engine.sdp_config.checkpoint.is_async else None)
        _saved_steps(trainer).add(step)


def _remove_old_checkpoints(trainer: Trainer, under_way: int | None = None) -> None:
    """Remove complete ones as ``save_total_limit`` says, and what this job began and could not complete."""
    folders = Path(str(trainer.args.output_dir)).glob("checkpoint-*")
    by_step = {int(path.name[11:]): path for path in folders if path.name[11:].isdigit()}
    complete = [step for step in sorted(by_step) if has_checkpoint(by_step[step])]
    limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
    gone = (_saved_steps(trainer) | {trainer.state.global_step}) & by_step.keys() - {*complete, under_way}
    if limit:
        of_best = {step for step in complete if best is not None and by_step[step].name == Path(best).name}
        gone |= set(complete) - of_best - set(complete[-max(1, limit - len(of_best)) :])
    try:
        remove_unfinished(Path(str(trainer.args.output_dir)))
        for step in gone:
            remove_folder(by_step[step])
    except OSError as error:
        logger.warning(f"checkpoints that are not needed any more are left in {trainer.args.output_dir}: {error}")


def _saved_steps(trainer: Trainer) -> set[int]:
    """Steps at which this trainer began a checkpoint."""
    steps: set[int] = trainer.__dict__.setdefault("_sdp_saved_steps", set())
    return steps


def prepare_for_training(trainer: Trainer, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Say what cannot be, before anything is built."""
    if asks_for_sdp(trainer):
        for key, why in (
            ("auto_find_batch_size", "the model is cut when training begins, and cannot begin again"),
            ("save_on_each_node", "checkpoints are in one folder that all ranks share"),
        ):
            if getattr(trainer.args, key):
                raise ConfigError(f"TrainingArguments.{key}: got True; takes False with SDP: {why}")
        drop_autos(trainer.accelerator)
        max_steps: int = kwargs["max_steps"] if "max_steps" in kwargs else args[0]
        say_total_steps(trainer.accelerator.state.deepspeed_plugin.deepspeed_config, max_steps)
    return original(*args, **kwargs)


def drop_autos(accelerator: Accelerator) -> None:
    """``"auto"`` in the SDP block leaves a value to its default; accelerate knows no such keys."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    blocks = [plugin.deepspeed_config.get(BLOCK)] if plugin is not None else []
    for block in blocks:
        if isinstance(block, dict):
            blocks += block.values()
            for key in [key for key, value in block.items() if value == "auto"]:
                del block[key]


METHODS: dict[str, Callable[..., Any]] = {
    "evaluation_loop": evaluation_loop,
    "save_model": save_model,
    "training_step": training_step,
    "floating_point_ops": floating_point_ops,
    "_finalize_training": finalize_training,
    "_prepare_for_training": prepare_for_training,
    "_save_checkpoint": save_checkpoint,
}
"""Methods of ``Trainer`` that differ with SDP; each takes the trainer and the method it replaces."""


class SDPTrainer(Trainer):
    """``transformers.Trainer`` that trains with SDP, as ``TrainingArguments(deepspeed=...)`` says.

    Arguments, methods, callbacks and folders are ``Trainer``'s. The DeepSpeed config holds the block
    ``"subnetwork_data_parallel"``; with ``"enabled": false`` in it this is ``Trainer``.

    ``trainer.model`` is this rank's subnetwork once training began; ``trainer.deepspeed`` the :class:`SDPEngine`.

    Raises:
        ConfigError: no DeepSpeed config, or no block in it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        report_uncaught()
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or BLOCK not in plugin.deepspeed_config:
            raise ConfigError(
                f"SDPTrainer: got no {'SDP block' if plugin else 'DeepSpeed config'}; takes "
                "TrainingArguments(deepspeed=<file or dict>) with a block "
                f'"{BLOCK}", or a launch by "accelerate launch" with a DeepSpeed plugin'
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        from deepspeed_sdp.hf.routing import routed

        with routed():
            return prepare_for_training(self, super()._prepare_for_training, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        return evaluation_loop(self, super().evaluation_loop, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_model(self, super().save_model, output_dir, _internal_call)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return training_step(self, super().training_step, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> Any:
        return floating_point_ops(self, super().floating_point_ops, inputs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        save_checkpoint(self, super()._save_checkpoint, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        return finalize_training(self, super()._finalize_training, *args, **kwargs)


@contextmanager
def _stands_for(trainer: Trainer, model: Any) -> Iterator[None]:
    own, trainer.model = trainer.model, model
    try:
        yield
    finally:
        trainer.model = own
