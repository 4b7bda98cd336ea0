"""A HuggingFace folder as a checkpoint of weights alone: where a job begins from a model that exists."""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from deepspeed_sdp.checkpoint.hf_names import saved_names
from deepspeed_sdp.checkpoint.json_files import FileName, Schema, read_as
from deepspeed_sdp.checkpoint.runs import Run, whole
from deepspeed_sdp.checkpoint.source import Read, Source
from deepspeed_sdp.errors import CheckpointError, SDPError
from deepspeed_sdp.subnetwork import meta_model, read_model_config

_FILES = "*.safetensors"


def is_hf_folder(folder: Path) -> bool:
    """Whether it holds a model in safetensors files and no checkpoints."""
    return (folder / "config.json").is_file() and any(folder.glob(_FILES))


class _Index(Schema):
    weight_map: dict[str, FileName]
    metadata: Annotated[dict[str, Any], Field(default_factory=dict)]


class HFFolder(Source):
    """Weights in the files that ``from_pretrained`` takes, trained or not.

    Raises:
        CheckpointError: a file is broken, or a weight stands in two.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        own = self._own_names()
        for path, keys in self._files():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in sorted(file.keys()) if keys is None else sorted(keys):
                        if own.get(key, key) in self._stored:
                            raise CheckpointError(f"checkpoint: {folder} holds {key} twice")
                        self._stored[own.get(key, key)] = path, key, tuple(file.get_slice(key).get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        is_there = name in self._stored and not kind.startswith("optimizer.")
        return self._stored[name][2] if is_there else None

    def held(self, kind: str, wanted: Run) -> Iterator[tuple[Run, Read]]:
        path, key, shape = self._stored[wanted.name]
        width = math.prod(shape[1:])

        def read(start: int, stop: int) -> torch.Tensor:
            try:
                with safe_open(path, framework="pt") as file:
                    if not shape:
                        return file.get_tensor(key).view(-1)  # type: ignore[no-any-return]
                    first = start // width
                    rows = file.get_slice(key)[first : -(-stop // width)]
                    return rows.reshape(-1)[start - first * width : stop - first * width]  # type: ignore[no-any-return]
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from None

        yield whole(wanted.name, shape), read

    def _files(self) -> Iterator[tuple[Path, set[str] | None]]:
        """Those that ``from_pretrained`` takes, and which of their tensors (``None``: all)."""
        single, index = self._folder / "model.safetensors", self._folder / "model.safetensors.index.json"
        if single.is_file() or not index.is_file():
            yield from ((path, None) for path in ([single] if single.is_file() else sorted(self._folder.glob(_FILES))))
            return
        by_file: dict[str, set[str]] = defaultdict(set)
        for key, file in read_as(index, _Index).weight_map.items():
            by_file[file].add(key)
        yield from ((self._folder / file, keys) for file, keys in sorted(by_file.items()))

    def _own_names(self) -> dict[str, str]:
        """Name in the folder -> name in the model, for a family that transformers knows."""
        try:
            names = saved_names(meta_model(read_model_config(self._folder, "config.json"), "config.json"))
        except (OSError, ValueError, SDPError):  # then they are taken as they are
            return {}
        return {saved: name for name, saved in names.items()}
