"""Documents from a user's files."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from deepspeed_sdp.errors import DataError

_DOCUMENT_BREAK = re.compile(r"\n(?:[ \t]*\n){2,}|\f")


def read_documents(paths: Iterable[Path]) -> list[str]:
    """All documents of the files, or of the text files in the folders, in order.

    ``.txt``: documents are separated by two or more blank lines or a form feed. ``.jsonl`` (``.jsonl.gz``) and
    ``.parquet``: one document per row, in the column ``text``.

    Raises:
        DataError: names the file that is missing, unreadable, broken, of another kind, or empty.
    """
    documents: list[str] = []
    for path in paths:
        for file in _expand(path):
            found = [text for text in _read(file) if text.strip()]
            if not found:
                raise DataError(f"{file}: holds no text")
            documents += found
    return documents


def _expand(path: Path) -> list[Path]:
    try:
        if not path.exists():
            raise DataError(f"{path}: does not exist; takes .txt, .jsonl or .parquet files or folders of them")
        if path.is_file():
            return [path]
        files = sorted(file for file in path.iterdir() if file.is_file() and _reader(file))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not files:
        raise DataError(f"{path}: holds no .txt, .jsonl or .parquet file")
    return files


def _read(file: Path) -> list[str]:
    reader = _reader(file)
    if reader is None:
        raise DataError(f"{file}: is no text file by its name; takes .txt, .jsonl, .jsonl.gz or .parquet")
    try:
        return reader(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start})") from None


def _reader(file: Path) -> Callable[[Path], list[str]] | None:
    name = file.name.lower()
    for suffix, reader in ((".txt", _read_txt), (".jsonl", _read_jsonl), (".jsonl.gz", _read_jsonl)):
        if name.endswith(suffix):
            return reader
    return _read_parquet if name.endswith(".parquet") else None


def _read_txt(file: Path) -> list[str]:
    return _DOCUMENT_BREAK.split(file.read_text(encoding="utf-8-sig"))


def _read_jsonl(file: Path) -> list[str]:
    documents = []
    try:
        # utf-8-sig: with or without the byte order mark of Windows editors.
        compressed = file.name.lower().endswith(".gz")
        with gzip.open(file, "rt", encoding="utf-8-sig") if compressed else file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _text_of(_parse(line, f"{file}: line {number}"), f"{file}: line {number}")
                    documents += [] if text is None else [text]
    except EOFError:
        raise DataError(f"{file}: is cut off in its compressed data") from None
    except zlib.error as error:
        raise DataError(f"{file}: is damaged in its compressed data: {error}") from None
    return documents


def _parse(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise DataError(f"{place} is not usable JSON: {error}") from None


def _text_of(row: object, place: str) -> str | None:
    if not isinstance(row, dict) or "text" not in row:
        keys = f"the keys {', '.join(map(repr, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{place} has {keys}; takes an object with a 'text' column")
    if row["text"] is None:  # a missing value, as parquet has them too
        return None
    if not isinstance(row["text"], str):
        raise DataError(f"{place}: 'text' is a {type(row['text']).__name__}; takes a string")
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:
        half = row["text"][error.start]
        raise DataError(f"{place}: 'text' holds half a character ({half!r}), which is no valid Unicode") from None
    return str(row["text"])


def _read_parquet(file: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{file}: has the columns {', '.join(map(repr, names))}; takes one named 'text'")
            column = table.read(columns=["text"])["text"]
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: is no readable parquet file: {str(error).splitlines()[0]}") from None
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise DataError(f"{file}: column 'text' is {column.type}; takes strings")
    return [text for text in column.to_pylist() if text is not None]
