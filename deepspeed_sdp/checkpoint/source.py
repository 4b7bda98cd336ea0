"""Where the tensors of a checkpoint come from, whatever its format, and how they come into memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from deepspeed_sdp.checkpoint.runs import Entry, Run, common
from deepspeed_sdp.errors import CheckpointError

Read = Callable[[int, int], torch.Tensor]
"""Elements ``[start, stop)`` of a run's columns, inside the run, as a flat tensor on the CPU."""


class Source(ABC):
    """Logical tensors, ``<kind>.<name>``, with the full model's shapes."""

    @abstractmethod
    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        """Shape of a logical tensor, ``None`` where there is none."""

    @abstractmethod
    def held(self, kind: str, wanted: Run) -> Iterator[tuple[Run, Read]]:
        """Runs that hold elements of ``wanted``, each of them once; more are looked for while more are asked for."""

    def fill(self, entries: Iterable[Entry]) -> None:
        """Read what ``entries`` are of.

        Raises:
            CheckpointError: something is missing, or has another shape.
        """
        for entry in entries:
            for wanted, values in entry.parts():
                kind = self._stored_kind(entry.kind, wanted.name)
                if kind is None:
                    continue
                shape = self.shape(kind, wanted.name)
                if shape != wanted.shape:
                    raise CheckpointError(
                        f"checkpoint: {kind}.{wanted.name} has shape {list(shape or ())}; the model takes "
                        f"{list(wanted.shape)}"
                    )
                self._fill(kind, wanted, values)

    def _fill(self, kind: str, wanted: Run, values: torch.Tensor) -> None:
        missing = wanted.numel
        for run, read in self.held(kind, wanted) if missing else ():
            here, there, shared = common(wanted, run)
            if shared:
                low = min(top * there.width + left for top, _, left, _ in shared) - there.column
                high = max((bottom - 1) * there.width + right for _, bottom, _, right in shared) - there.column
                found, held = replace(there, start=low, stop=high), read(low, high)
                for part in shared:
                    here.view(values, part).copy_(found.view(held, part))
                    missing -= (part[1] - part[0]) * (part[3] - part[2])
            if missing <= 0:
                break
        if missing:
            raise CheckpointError(f"checkpoint: lacks a part of {kind}.{wanted.name}")

    def _stored_kind(self, kind: str, name: str) -> str | None:
        """As which kind it is in the checkpoint; ``None`` for state that a parameter did not have there.

        A parameter may be trained in one job and frozen in another.
        """
        if self.shape(kind, name) is not None:
            return kind
        other = "master" if kind == "model" else "model"
        if self.shape(other, name) is not None:
            return None if kind.startswith("optimizer.") else other
        raise CheckpointError(f"checkpoint: holds no {kind}.{name}")
