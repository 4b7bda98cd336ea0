"""Documents that datatrove has tokenised: ids in ``NAME.ds``, and beside it where each document ends, ``.ds.index``.

Where there is a ``.ds.metadata``, its lines are ``TOKENIZER|BYTES_PER_ID``, the number of ids, and that for
people.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIX = ".ds"
_END_BYTES = 8
_METADATA_BYTES = 1 << 16
_TYPES = {2: "<u2", 4: "<u4"}


class TokenFile:
    """Ids of documents, mapped from disk.

    Raises:
        ValueError: the three files contradict one another.
        OSError: the ids or the index cannot be read.
    """

    def __init__(self, path: str) -> None:
        size, of_index = (Path(name).stat().st_size for name in (path, f"{path}.index"))
        if of_index % _END_BYTES or (size and not of_index):
            raise ValueError(f"its index has {of_index} bytes; takes {_END_BYTES} for each document")
        self._ends: npt.NDArray[Any] = _mapped(f"{path}.index", "<u8", of_index)
        count = int(self._ends[-1]) if of_index else 0
        width = size // count if count else 2
        if width not in _TYPES or width * count != size:
            raise ValueError(f"its index ends at id {count}, which does not go with {size} bytes")
        _check_metadata(Path(f"{path}.metadata"), width, count)
        self._ids: npt.NDArray[Any] = _mapped(path, _TYPES[width], size)

    def __len__(self) -> int:
        """Documents."""
        return len(self._ends)

    def documents(self, first: int, last: int) -> Sequence[npt.NDArray[Any]]:
        """Ids ``[n]`` of each of the documents ``[first, last)``, not read until they are looked at.

        Raises:
            ValueError: they do not end in ascending order.
        """
        edges = np.append(self._ends[first - 1] if first else np.uint64(0), self._ends[first:last])
        if (edges[1:] < edges[:-1]).any() or edges[-1] > len(self._ids):
            raise ValueError(f"its index is not in ascending order from document {first} on")
        return [self._ids[start:end] for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def _mapped(path: str, dtype: str, size: int) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. A plain view, as those are pickled for other processes without the map.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)


def _check_metadata(path: Path, width: int, count: int) -> None:
    if not path.exists():
        return
    with path.open("rb") as file:
        lines = file.read(_METADATA_BYTES).decode("utf-8", "replace").split("\n")
    said = lines[0].rpartition("|")[2] if "|" in lines[0] else str(width)
    if said != str(width) or lines[1:2] != [str(count)]:
        raise ValueError(
            f"its metadata say {said} bytes per id and {' '.join(lines[1:2])} ids; it has {width} and {count}"
        )
