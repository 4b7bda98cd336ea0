"""Full models from HuggingFace config files, without memory."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.config import read_json
from deepspeed_sdp.errors import ConfigError

# Each is a tree of Python objects, on the meta device too.
_MOST_LAYERS = 10_000
_LONGEST_LINE = 300


def read_model_config(path: str | Path, key: str = "--model") -> Any:
    """A ``PretrainedConfig`` from a ``config.json`` or its folder; nothing is looked up on a hub, nor executed.

    Raises:
        ConfigError: names ``key`` and the file when it is missing or describes no model that transformers knows.
    """
    from transformers import AutoConfig

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    read_json(file, key)
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
    except Exception as error:  # damaged files raise almost anything
        raise ConfigError(f"{key}: {path}: {_line(error)}") from None
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers > _MOST_LAYERS:
        raise ConfigError(f"{key}: {path}: num_hidden_layers: got {layers!r}; takes up to {_MOST_LAYERS}")
    return config


def meta_model(config: Any, key: str = "--model") -> nn.Module:
    """The causal language model of ``config`` on the meta device.

    Raises:
        ConfigError: transformers has no causal language model for it, or its sizes do not fit each other.
    """
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, trust_remote_code=False)
    except Exception as error:  # sizes that do not fit each other raise almost anything
        raise ConfigError(f"{key}: {_line(error)}") from None
    return model


def _line(error: Exception) -> str:
    """Not the list of all models that transformers knows."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."
