"""The ways by which accelerate and Trainer come to DeepSpeed, led through SDP where its config asks for that."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

# What is patched: owner, name, and what stood there.
_patched: list[tuple[Any, str, Any]] = []


def enable() -> None:
    """Bring SDP to ``transformers.Trainer`` and ``accelerate.Accelerator``; call it before they are built.

    From then on, in this process, a DeepSpeed config with the block ``"subnetwork_data_parallel"`` trains with SDP; all
    else is as before. :func:`disable` takes it back.
    """
    if _patched:
        return
    report_uncaught()
    # accelerate starts NCCL before the engine can.
    os.environ.setdefault(ORDER, "1")
    _patch(deepspeed, "initialize", _routed(deepspeed.initialize))
    _patch(Accelerator, "prepare", _prepare(Accelerator.prepare))
    _patch(Accelerator, "get_state_dict", _get_state_dict(Accelerator.get_state_dict))
    for name, method in METHODS.items():
        _patch(Trainer, name, _method(getattr(Trainer, name), method))


def disable() -> None:
    """Undo :func:`enable`."""
    while _patched:
        owner, name, original = _patched.pop()
        setattr(owner, name, original)


def _patch(owner: Any, name: str, new: Any) -> None:
    _patched.append((owner, name, getattr(owner, name)))
    setattr(owner, name, new)


def build_whole_models() -> None:
    """Keep transformers from building under ``deepspeed.zero.Init`` what SDP will cut.

    At ZeRO stage 3 ``from_pretrained`` and ``from_config`` do so once ``TrainingArguments`` told them of the DeepSpeed
    config; of one with an SDP block they are not told.
    """
    of_class: Any = HfDeepSpeedConfig
    original: Callable[..., None] = of_class.__init__
    forget: Callable[[], None] = unset_hf_deepspeed_config

    @functools.wraps(original)
    def initialize_config(config: Any, *args: Any, **kwargs: Any) -> None:
        original(config, *args, **kwargs)
        if BLOCK in config.config:
            forget()

    of_class.__init__ = initialize_config


@contextmanager
def routed() -> Iterator[None]:
    """Inside, ``deepspeed.initialize`` is SDP's for configs with a block."""
    before = deepspeed.initialize
    deepspeed.initialize = _routed(before)
    try:
        yield
    finally:
        deepspeed.initialize = before


def _routed(original: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(original, "is_routed"):
        return original

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _has_block(kwargs.get("config") or kwargs.get("config_params")):
            return original(*args, **kwargs)
        _check_processes()
        # SDP itself calls DeepSpeed's.
        routed_here, deepspeed.initialize = deepspeed.initialize, original
        try:
            return initialize(*args, **kwargs)
        finally:
            deepspeed.initialize = routed_here

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
