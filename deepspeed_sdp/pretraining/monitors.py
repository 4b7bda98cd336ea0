"""DeepSpeed's monitors of a run: checked before anything is built."""

import importlib
from pathlib import Path
from typing import Any

from deepspeed_sdp.errors import ConfigError

# DeepSpeed's block -> what it imports.
_NEEDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def add_monitors(ds_config: dict[str, Any], output: Path, tensorboard: bool, wandb_project: str | None) -> None:
    """Switch TensorBoard (into ``output/tensorboard``) and Weights & Biases on, where asked for."""
    if tensorboard:
        ds_config["tensorboard"] = {"enabled": True, "output_path": str(output), "job_name": "tensorboard"}
    if wandb_project:
        ds_config["wandb"] = {**ds_config.get("wandb", {}), "enabled": True, "project": wandb_project}


def check_monitors(ds_config: dict[str, Any]) -> None:
    """Whether the packages of the monitors that are switched on are there.

    Raises:
        ConfigError: one is not.
    """
    for block, module in _NEEDS.items():
        if isinstance(ds_config.get(block), dict) and ds_config[block].get("enabled"):
            try:
                importlib.import_module(module)
            except ImportError as error:
                package = "comet_ml" if block == "comet" else block
                raise ConfigError(f"{block}.enabled: got true; takes it with {package} installed: {error}") from None
