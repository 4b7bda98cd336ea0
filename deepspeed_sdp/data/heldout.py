"""The first held-out sequences of a source, read once and kept in a file."""

import contextlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from deepspeed_sdp.data.documents import stream_documents
from deepspeed_sdp.data.encoding import DocumentEncoder, Ids
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.separation import Reset, packed_example
from deepspeed_sdp.data.source import Source
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.errors import DataError, OutputError


@dataclass(frozen=True)
class HeldoutSequences:
    """Packed sequences of held-out documents.

    Attributes:
        ids: token ids ``[n, T]``.
        starts: int64 ``[documents]``, where documents begin in ``ids`` laid out flat, ascending.
        skipped: what was passed over to find them.
    """

    ids: Ids
    starts: npt.NDArray[np.int64]
    skipped: Skipped

    def examples(self, reset: Reset) -> list[dict[str, torch.Tensor]]:
        """Items ``{"input_ids": int64 [T], "labels": int64 [T], ...}``; see :func:`packed_example`."""
        length = self.ids.shape[1]
        edges = np.searchsorted(self.starts, np.arange(0, self.ids.size + 1, length))
        return [
            packed_example(row, self.starts[edges[n] : edges[n + 1]] - n * length, reset)
            for n, row in enumerate(self.ids)
        ]

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Whole or not at all. ``identity`` is JSON, of what they were made of.

        Raises:
            OutputError: it cannot be written.
        """
        about = json.dumps({"identity": identity, "skipped": self.skipped.to_json()}, sort_keys=True)
        staging = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            with staging.open("wb") as file:
                np.savez_compressed(file, ids=self.ids, starts=self.starts, about=np.array(about))
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):
                staging.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> "HeldoutSequences | None":
        """What :meth:`save` wrote; ``None`` if it is not there, damaged, or of another identity."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                if about["identity"] != json.loads(json.dumps(identity)):
                    return None
                return cls(saved["ids"], saved["starts"], Skipped.from_json(about["skipped"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            return None


def read_heldout(
    source: Source, encoder: DocumentEncoder, fraction: float, seq_length: int, count: int, progress: bool = False
) -> HeldoutSequences:
    """The first ``count`` sequences of the documents held out of ``source``, in its order.

    Reads about ``count * seq_length / fraction`` tokens of text for it, and tokenises those that are held out.

    Raises:
        DataError: there are fewer, or a fault at which the policy is to stop.
    """
    wanted, filled = count * seq_length, 0
    parts: list[Ids] = []
    starts: list[int] = []
    skipped = Skipped()
    bar = tqdm(total=wanted, unit=" tokens", unit_scale=True, desc="held-out text", disable=not progress, leave=False)
    with bar:
        for text, _ in stream_documents(source, skipped):
            if is_heldout(text, fraction):
                parts += encoder([text])
                starts.append(filled)
                filled += len(parts[-1])
                bar.update(min(filled, wanted) - bar.n)
            if filled >= wanted:
                break
    if filled < wanted:
        raise DataError(
            f"--heldout_fraction: got {fraction}, which holds out {filled} tokens; {count} sequences take {wanted}"
        )
    ids = np.concatenate(parts)[:wanted].reshape(count, seq_length)
    return HeldoutSequences(ids, np.array(starts, dtype=np.int64), skipped)
