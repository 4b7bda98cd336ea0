"""The documents in rows of a file, and which rows hold none."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepspeed_sdp.data.encoding import Document
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.source import DataFile, SourceSpec


class BrokenRow(NamedTuple):
    """Stands for a value that could not even be decoded."""

    reason: str


class Chunk(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
        group: the row group (of other files all is one).
        number: of the chunk in the group.
        first_row: of the file, from 0 on.
        rows: undecoded lines, values of the text column, or documents, as text or as ids.
    """

    group: int
    number: int
    first_row: int
    rows: Sequence[Any]


def text_of(row: Any, column: str) -> str | BrokenRow:
    """The text of a row of a chunk, or why it has none."""
    if isinstance(row, np.ndarray):
        return ""
    value = _parsed(row, column) if isinstance(row, bytes) else row
    if isinstance(value, BrokenRow):
        return value
    if value is None:
        return BrokenRow("text is null")
    if not isinstance(value, str):
        return BrokenRow("text is no string")
    try:
        value.encode()
    except UnicodeEncodeError:
        return BrokenRow("text holds half a character")
    return value


def _parsed(line: bytes, column: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return BrokenRow("line is not UTF-8")
    except (ValueError, RecursionError):
        return BrokenRow("line is no valid JSON")
    if not isinstance(row, dict):
        return BrokenRow("line is no JSON object")
    return row[column] if column in row else BrokenRow(f"no column {column!r}")


def documents_of(chunk: Chunk, file: DataFile, spec: SourceSpec, skipped: Skipped) -> Iterator[tuple[Document, int]]:
    """The usable documents of a chunk, with their row in the file.

    Raises:
        DataError: a row is broken, and the policy is to stop.
    """
    unit, first = {"lines": ("line", 1), "text": ("document", 1)}.get(file.kind, ("row", 0))
    for number, row in enumerate(chunk.rows, start=chunk.first_row + first):
        if isinstance(row, np.ndarray) and len(row):
            yield row, number
            continue
        if isinstance(row, bytes) and not row.strip():
            continue
        text = text_of(row, spec.text_column)
        if text == "" or (isinstance(text, str) and text.isspace()):
            skipped.add("row: text is empty", f"{file.path}: {unit} {number}")
        elif isinstance(text, BrokenRow):
            skipped.row(text.reason, f"{file.path}: {unit} {number}", spec.faults)
        else:
            yield text, number
