"""GPUs as data, and the links between them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.estimate.job import DTYPES

_TABLE = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class GPU:
    """One accelerator; vendors' figures for dense matrices, of which a job reaches a part (``mfu``).

    Attributes:
        memory: bytes.
        tflops: 10¹² FLOPs per second, by name of the dtype.
        bandwidth: bytes per second of its memory.
        link: bytes per second that it sends to others in its node, in one direction.
    """

    name: str
    memory: float
    tflops: dict[str, float]
    bandwidth: float
    link: float

    def flops(self, dtype: torch.dtype) -> float:
        """FLOPs per second in ``dtype``."""
        return 1e12 * next(self.tflops[name] for name, value in DTYPES.items() if value == dtype)


@dataclass(frozen=True)
class Cluster:
    """GPUs and how they reach each other.

    Attributes:
        per_node: GPUs of a node, joined by ``gpu.link``.
        network: bytes per second that one GPU sends to other nodes.
        mfu: share of the vendor's FLOPs that matrix products reach.
        overlap: share of the communication in the backward pass that can hide behind computation.
        reserved: bytes of a GPU that no tensor gets: the CUDA context, the default group's communicator, fragmentation.
        communicator: bytes that each further communicator of NCCL takes beside them. Assumed, not measured: a ring's
            receiving buffers of all protocols, 9.4 MiB in each of 24 channels.
    """

    gpu: GPU
    per_node: int = 8
    network: float = 50e9
    mfu: float = 0.4
    overlap: float = 0.9
    reserved: float = 2e9
    communicator: float = 0.24e9


def gpu_names() -> list[str]:
    """Names in the table."""
    return list(_read())


def find_gpu(name: str, **own: Any) -> GPU:
    """A GPU of the table.

    Args:
        own: ``memory_gb``, ``tflops`` (of every dtype), ``bandwidth_gb_s``, ``link_gb_s``: instead of the table's.

    Raises:
        ConfigError: the table has no such GPU.
    """
    table = _read()
    if name.lower() not in table:
        raise ConfigError(
            f"--gpu: got {name}; takes one of {', '.join(table)}, with --gpu_memory_gb and the like for others"
        )
    row = table[name.lower()]
    gpu = GPU(
        name.lower(),
        1e9 * row["memory_gb"],
        dict(row["tflops"]),
        1e9 * row["bandwidth_gb_s"],
        1e9 * row["link_gb_s"],
    )
    if own.get("memory_gb") is not None:
        gpu = replace(gpu, memory=1e9 * own["memory_gb"])
    if own.get("tflops") is not None:
        gpu = replace(gpu, tflops=dict.fromkeys(DTYPES, own["tflops"]))
    if own.get("bandwidth_gb_s") is not None:
        gpu = replace(gpu, bandwidth=1e9 * own["bandwidth_gb_s"])
    if own.get("link_gb_s") is not None:
        gpu = replace(gpu, link=1e9 * own["link_gb_s"])
    return gpu


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU of the table that a device's own name (``"NVIDIA H100 80GB HBM3"``) stands for, if there is one.

    The most particular of the names fits, all of whose parts stand in the device's.
    """
    said = device_name.lower().replace(" ", "")
    fitting = [name for name in _read() if name != "cpu" and all(part in said for part in name.split("-"))]
    return find_gpu(max(fitting, key=len)) if fitting else None


def _read() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return table
