"""Finished shards as training sequences, mapped from disk."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from deepspeed_sdp.data import manifest as manifests
from deepspeed_sdp.data.separation import Reset, check_reset, packed_example
from deepspeed_sdp.data.shard_writer import index_name, shard_name
from deepspeed_sdp.errors import ConfigError, DataError

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Shards:
    """A folder that ``deepspeed-sdp data`` made.

    Attributes:
        manifest: what it says about itself.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def tokenizer_folder(self) -> Path:
        """An ordinary HuggingFace tokenizer."""
        return self.folder / manifests.TOKENIZER

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer gives."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def eos_token_id(self) -> int:
        """Ends every document, and stands nowhere else."""
        return int(self.manifest["tokenizer"]["eos_token_id"])

    def tokens(self, split: Split) -> int:
        """Of one split."""
        return int(self.manifest["splits"][split]["tokens"])

    def content(self, split: Split) -> str:
        """SHA-256 of the split's ids and documents, in hex, wherever the shards were made."""
        files = sorted((f["name"], f["sha256"]) for f in self.manifest["files"] if f["name"].startswith(f"{split}-"))
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def sequences(self, split: Split, seq_length: int, reset: Reset = "none") -> "ShardSequences":
        """The split cut into sequences; ``reset`` keeps documents apart: see :func:`packed_example`.

        Raises:
            DataError: the split is shorter than one sequence.
            ConfigError: unknown ``split`` or ``reset``, or ``seq_length`` below 2.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"split: got {split!r}; takes train or heldout")
        return ShardSequences(self, split, seq_length, check_reset(reset))


def open_shards(folder: str | Path) -> Shards:
    """Finished shards.

    Raises:
        DataError: there are none in ``folder``, another version made them, the manifest is damaged or does not list
            what it needs, a file is missing or has another size, or the tokenizer's files differ.
    """
    folder = Path(folder)
    manifest = manifests.read_manifest(folder)
    manifests.check_files(folder, manifest)
    return Shards(folder, manifest)


class ShardSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequence ``i`` is tokens ``[i T, (i + 1) T)`` of the split, whatever the shards' size; a rest is left out."""

    def __init__(self, shards: Shards, split: Split, seq_length: int, reset: Reset) -> None:
        if seq_length < 2:
            raise ConfigError(f"--seq_length: got {seq_length}; takes a number from 2 on")
        self.shards = shards
        self.split = split
        self.seq_length = seq_length
        self.reset = reset
        tokens = shards.tokens(split)
        self._length = tokens // seq_length
        if not self._length:
            raise DataError(
                f"{shards.folder}: {tokens} {split} tokens are too few for one sequence of {seq_length}; give more "
                "text or a smaller --seq_length"
            )
        self._shard_tokens = int(shards.manifest["shard_tokens"])
        self._mapped: list[npt.NDArray[Any]] | None = None
        self._starts: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """See :func:`packed_example`; raises ``IndexError`` past the end."""
        if not -self._length <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        first = int(index) % self._length * self.seq_length
        return packed_example(self.tokens(first), self.starts(first), self.reset)

    def ids(self, which: Iterable[int]) -> npt.NDArray[Any]:
        """``[n, T]`` ids of some sequences."""
        return np.stack([self.tokens(number * self.seq_length) for number in which])

    def tokens(self, first: int) -> npt.NDArray[Any]:
        """``T`` ids from token ``first`` of the split on.

        Raises:
            DataError: one is past the tokenizer's largest.
        """
        place, parts, left = first, [], self.seq_length
        while left:
            number, offset = divmod(first, self._shard_tokens)
            part = self._shards()[number][offset : offset + left]
            parts.append(part)
            first += len(part)
            left -= len(part)
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if ids.max() >= self.shards.vocab_size:
            raise self._damaged(shard_name(self.split, place // self._shard_tokens), f"holds the id {ids.max()}")
        return ids

    def starts(self, first: int) -> npt.NDArray[np.int64]:
        """Where documents begin in ``[first, first + T)``, from ``first``.

        Raises:
            DataError: they are not in ascending order.
        """
        if self._starts is None:
            self._starts = np.memmap(self.shards.folder / index_name(self.split), dtype="<i8", mode="r")
        # Both of the index's own type, else all of it would be converted.
        low, high = np.searchsorted(self._starts, np.array([first, first + self.seq_length], dtype="<i8"))
        found = np.asarray(self._starts[low:high]) - first
        if (np.diff(found, prepend=-1, append=self.seq_length) <= 0).any():
            raise self._damaged(index_name(self.split), "is not in ascending order")
        return found

    def _damaged(self, name: str, how: str) -> DataError:
        place = self.shards.folder
        return DataError(
            f"{place / name}: {how}; 'deepspeed-sdp data --inspect {place} --verify' finds what is damaged"
        )

    def _shards(self) -> list[npt.NDArray[Any]]:
        if self._mapped is None:
            count = self.shards.manifest["splits"][self.split]["shards"]
            paths = [self.shards.folder / shard_name(self.split, number) for number in range(count)]
            self._mapped = [np.memmap(path, dtype=self.shards.manifest["dtype"], mode="r") for path in paths]
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a loader map the files themselves; pickling a map would copy it.
        return {**self.__dict__, "_mapped": None, "_starts": None}
