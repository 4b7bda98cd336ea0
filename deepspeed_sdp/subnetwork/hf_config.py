"""Full models from HuggingFace config files, without memory."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed_sdp.config import read_json
from deepspeed_sdp.errors import ConfigError


def read_model_config(path: str | Path, key: str = "--model_config") -> Any:
    """A ``PretrainedConfig`` from a ``config.json`` or its folder; nothing is looked up on a hub, nor executed.

    Raises:
        ConfigError: names ``key`` and the file when it is missing or describes no model that transformers knows.
    """
    from transformers import AutoConfig

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    read_json(file, key)
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {path}: {str(error).splitlines()[0]}") from None


def meta_model(config: Any, key: str = "--model_config") -> nn.Module:
    """The causal language model of ``config`` on the meta device.

    Raises:
        ConfigError: transformers has no causal language model for it, or its sizes do not fit each other.
    """
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    return model
