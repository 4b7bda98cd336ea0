"""``transformers.Trainer`` with SDP: what it evaluates and saves is the full model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from deepspeed_sdp.config import BLOCK
from deepspeed_sdp.engine import SDPEngine
from deepspeed_sdp.errors import ConfigError

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
    """``evaluate`` and ``predict`` see the full model, which every rank has for as long as they take."""
    engine = sdp_engine(trainer)
    if engine is not None:
        is_streamed = engine.sdp_config.evaluation == "streamed"
        with engine.full_model(is_streamed) as model, _stands_for(trainer, model):
            return original(*args, **kwargs)
    if not asks_for_sdp(trainer):
        return original(*args, **kwargs)
    # Before training nothing is cut, and there is no engine to build.
    _move(trainer.model, trainer.args.device)
    trainer.is_deepspeed_enabled = False
    try:
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
    weights = engine.full_state_dict()
    if weights is not None:
        skeleton = engine.full_skeleton(next(iter(weights.values())).dtype)
        with _stands_for(trainer, skeleton):
            trainer._save(output_dir, state_dict=weights)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


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
    return original(*args, **kwargs)


def prepare_for_training(trainer: Trainer, original: Original, *args: Any, **kwargs: Any) -> Any:
    """``"auto"`` in the SDP block leaves a value to its default; accelerate knows no such keys."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    block = plugin.deepspeed_config.get(BLOCK) if plugin is not None else None
    if isinstance(block, dict):
        for key in [key for key, value in block.items() if value == "auto"]:
            del block[key]
    return original(*args, **kwargs)


METHODS: dict[str, Callable[..., Any]] = {
    "evaluation_loop": evaluation_loop,
    "save_model": save_model,
    "floating_point_ops": floating_point_ops,
    "_finalize_training": finalize_training,
    "_prepare_for_training": prepare_for_training,
}
"""Methods of ``Trainer`` that differ with SDP; each takes the trainer and the method it replaces."""


class SDPTrainer(Trainer):
    """``transformers.Trainer`` that trains with SDP, as ``TrainingArguments(deepspeed=...)`` says.

    Arguments, methods, callbacks and folders are ``Trainer``'s. The DeepSpeed config holds the block
    ``"subnetwork_data_parallel"``; without it, or with ``"enabled": false``, this is ``Trainer``.

    ``trainer.model`` is this rank's subnetwork once training began; ``trainer.deepspeed`` the :class:`SDPEngine`.

    Raises:
        ConfigError: no DeepSpeed config, so there is nothing that could train subnetworks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.is_deepspeed_enabled:
            raise ConfigError(
                "SDPTrainer: got no DeepSpeed config; takes TrainingArguments(deepspeed=<file or dict>) with a block "
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

    def floating_point_ops(self, inputs: dict[str, Any]) -> Any:
        return floating_point_ops(self, super().floating_point_ops, inputs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        return finalize_training(self, super()._finalize_training, *args, **kwargs)


def _move(model: Any, device: torch.device) -> None:
    model.to(device)


@contextmanager
def _stands_for(trainer: Trainer, model: Any) -> Iterator[None]:
    own, trainer.model = trainer.model, model
    try:
        yield
    finally:
        trainer.model = own
