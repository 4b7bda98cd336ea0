"""The random numbers of this process: Python's, NumPy's, torch's, and the accelerator's."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def random_state() -> dict[str, Any]:
    """Where their generators are, as ``torch.load(weights_only=True)`` takes it."""
    name, keys, *rest = np.random.get_state()
    accelerator = get_accelerator()
    on_device = accelerator.get_rng_state() if accelerator.device_name() != "cpu" else None
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "device": on_device,
    }


def set_random_state(saved: Mapping[str, Any]) -> None:
    """Put the generators where :func:`random_state` found them."""
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["device"] is not None and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(saved["device"])
