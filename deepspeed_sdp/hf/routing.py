"""The ways by which accelerate and Trainer come to DeepSpeed, led through SDP where its config asks for that."""

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
from accelerate import Accelerator, PartialState
from transformers import Trainer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from deepspeed_sdp.config import BLOCK, read_json
from deepspeed_sdp.engine import SDPEngine, initialize
from deepspeed_sdp.engine.deepspeed.start import ORDER
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.failures import report_uncaught
from deepspeed_sdp.hf.trainer import METHODS, SDPTrainer, drop_autos
from deepspeed_sdp.patches import Undo, patch, patched

_undo: list[Undo] = []


def enable() -> None:
    """Bring SDP to ``transformers.Trainer`` and ``accelerate.Accelerator``; call it before they are built.

    From then on, in this process, a DeepSpeed config with the block ``"subnetwork_data_parallel"`` trains with SDP; all
    else is as before. :func:`disable` takes it back.
    """
    if _undo:
        return
    report_uncaught()
    # accelerate starts NCCL before the engine can.
    os.environ.setdefault(ORDER, "1")
    for owner, name, new in (
        (deepspeed, "initialize", _routed(deepspeed.initialize)),
        (Accelerator, "prepare", _prepare(Accelerator.prepare)),
        (Accelerator, "get_state_dict", _get_state_dict(Accelerator.get_state_dict)),
        *((Trainer, name, _method(getattr(Trainer, name), method)) for name, method in METHODS.items()),
    ):
        _undo.append(patch(owner, name, new))


def disable() -> None:
    """Undo :func:`enable`."""
    while _undo:
        _undo.pop()()


def build_whole_models() -> Undo:
    """Keep transformers from building under ``deepspeed.zero.Init`` what SDP will cut.

    At ZeRO stage 3 ``from_pretrained`` and ``from_config`` do so once ``TrainingArguments`` told them of the DeepSpeed
    config; of one with an SDP block they are not told. What is returned takes it back.
    """
    original: Callable[..., None] = HfDeepSpeedConfig.__init__
    forget: Callable[[], None] = unset_hf_deepspeed_config

    @functools.wraps(original)
    def initialize_config(config: Any, *args: Any, **kwargs: Any) -> None:
        original(config, *args, **kwargs)
        if BLOCK in config.config:
            forget()

    return patch(HfDeepSpeedConfig, "__init__", initialize_config)


def routed() -> AbstractContextManager[None]:
    """Inside, ``deepspeed.initialize`` is SDP's for configs with a block."""
    return patched(deepspeed, "initialize", _routed(deepspeed.initialize))


def _routed(original: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(original, "is_routed"):
        return original

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _has_block(kwargs.get("config") or kwargs.get("config_params")):
            return original(*args, **kwargs)
        _check_processes()
        # SDP itself calls DeepSpeed's.
        with patched(deepspeed, "initialize", original):
            return initialize(*args, **kwargs)

    call.is_routed = True  # type: ignore[attr-defined]
    return call


def _check_processes() -> None:
    """Without an accelerator, accelerate takes each process for the only one unless it is told of CPUs."""
    launched = os.environ.get("WORLD_SIZE", "1")
    seen = PartialState().num_processes if PartialState._shared_state else int(launched)
    if seen != int(launched):
        raise ConfigError(
            f"accelerate: sees {seen} of {launched} processes; on CPUs takes TrainingArguments(use_cpu=True), which is "
            "--use_cpu, or PartialState(cpu=True) before the Accelerator is built"
        )


def _has_block(config: Any) -> bool:
    if isinstance(config, str | Path):
        config = read_json(config, "deepspeed_config")
    return isinstance(config, Mapping) and BLOCK in config


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        drop_autos(accelerator)
        return original(accelerator, *args, **kwargs)

    return call


def _get_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(accelerator: Accelerator, model: Any, unwrap: bool = True) -> Any:
        if isinstance(model, SDPEngine):
            # On all ranks but the first, which writes it, there is none.
            return model.full_state_dict() or {}
        return original(accelerator, model, unwrap)

    return call


def _method(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if isinstance(trainer, SDPTrainer):  # which comes here by itself
            return original(trainer, *args, **kwargs)
        return method(trainer, functools.partial(original, trainer), *args, **kwargs)

    return call
