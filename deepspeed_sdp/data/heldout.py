"""The first held-out sequences of a source, read once and kept in a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from deepspeed_sdp.data.documents import stream_documents
from deepspeed_sdp.data.encoding import DocumentEncoder, Ids
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.manifest import Skips
from deepspeed_sdp.data.separation import Reset, packed_example
from deepspeed_sdp.data.source import Source
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.errors import DataError, OutputError
from deepspeed_sdp.files import replacing
from deepspeed_sdp.schemas import Schema, check_value

_ABOUT_BYTES = 1 << 20


class _About(Schema):
    identity: dict[str, Any]
    skipped: dict[str, Skips]


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
        try:
            with replacing(path) as new, new.open("wb") as file:
                np.savez_compressed(file, ids=self.ids, starts=self.starts, about=np.array(about))
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> "HeldoutSequences | None":
        """What :meth:`save` wrote; ``None`` if it is not there, damaged, or of another identity.

        Args:
            identity: its ``count`` and ``seq_length`` are the shape ``[n, T]``.
        """
        shape = identity["count"], identity["seq_length"]
        # A token and the start of a document for each, and what is said about them.
        most = shape[0] * shape[1] * (4 + 8) + _ABOUT_BYTES
        try:
            with ZipFile(path) as packed:
                if sum(part.file_size for part in packed.infolist()) > most:
                    return None
            with np.load(path, allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                check_value(about, _About, DataError, str(path))
                ids, starts = saved["ids"], saved["starts"]
        except Exception:  # damaged archives raise almost anything
            return None
        is_fit = ids.shape == shape and ids.dtype in ("<u2", "<u4") and starts.ndim == 1 and starts.dtype == np.int64
        if not is_fit or (np.diff(starts, prepend=-1, append=ids.size) <= 0).any():
            return None
        if about["identity"] != json.loads(json.dumps(identity)):
            return None
        return cls(ids, starts, Skipped.from_json(about["skipped"]))


def join(parts: Sequence[HeldoutSequences]) -> HeldoutSequences:
    """Those of several sources, one after another."""
    before = np.cumsum([0, *(part.ids.size for part in parts)])
    starts = [part.starts + first for part, first in zip(parts, before, strict=False)]
    skipped = Skipped()
    for part in parts:
        skipped.merge(part.skipped)
    return HeldoutSequences(np.concatenate([part.ids for part in parts]), np.concatenate(starts), skipped)


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
            if is_heldout(encoder.text(text), fraction):
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
