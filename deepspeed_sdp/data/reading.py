"""Rows of parquet, JSON lines, plain text and tokenised documents, a chunk at a time and from any chunk on.

Past broken files and lost connections too.
"""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from deepspeed_sdp.data.background import check_stop
from deepspeed_sdp.data.builtin_text import builtin_documents
from deepspeed_sdp.data.faults import Retry, Skipped, is_lost, reason_of
from deepspeed_sdp.data.plain_text import split_text
from deepspeed_sdp.data.rows import BrokenRow, Chunk
from deepspeed_sdp.data.source import DataFile, SourceSpec
from deepspeed_sdp.data.token_file import TokenFile

CHUNK_ROWS = 1024
# A row group of FineWeb's text fits: over the network that is one request.
_BUFFER = 4 << 20
# Small, as a whole one is lost where compressed data are cut off.
_BLOCK = 1 << 15
# Of the files read last: workers open a file for every row group, and a footer can be a megabyte.
_FOOTERS = 4
_footers: dict[DataFile, pyarrow.parquet.FileMetaData] = {}


class Place(NamedTuple):
    """Where a file is read from on: a chunk of a row group."""

    group: int = 0
    number: int = 0


START = Place()


class _Broken(Exception):
    """The rest of the file (or with ``next_group`` of the group) cannot be read, now or later."""

    def __init__(self, reason: str, next_group: int | None = None) -> None:
        super().__init__(reason)
        self.next_group = next_group


def group_sizes(file: DataFile, spec: SourceSpec, skipped: Skipped) -> list[int]:
    """Rows of each row group of a parquet file; none where it is broken and skipped.

    Raises:
        DataError: it is broken, and the policy is to stop.
    """

    def read() -> list[int]:
        with file.open() as raw, _parquet(raw, file, spec.text_column) as table:
            return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]

    try:
        return Retry(file.path, spec.faults, skipped).call(read)
    except (_Broken, OSError) as error:
        skipped.file(reason_of(error), file.path, spec.faults)
        return []


def read_chunks(
    file: DataFile,
    spec: SourceSpec,
    skipped: Skipped,
    start: Place = START,
    groups: Sequence[int] | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[Chunk]:
    """Chunks of ``chunk_rows`` rows from ``start`` on.

    Args:
        groups: the row groups to read, in this order; ``start.group`` counts in it. Of parquet only.

    Raises:
        DataError: a connection stays lost, or the file is broken and the policy is to stop.
    """
    place = start
    retry = Retry(file.path, spec.faults, skipped)
    while True:
        try:
            for chunk in _chunks(file, spec, place, groups, chunk_rows):
                retry.progress()
                yield chunk
                place = Place(_position(groups, chunk.group, place), chunk.number + 1)
            return
        except (_Broken, OSError) as error:
            if isinstance(error, OSError) and is_lost(error):
                retry.failed(error)
                continue
            skipped.file(reason_of(error), file.path, spec.faults)
            if not isinstance(error, _Broken) or error.next_group is None:
                return
            place = Place(error.next_group)
        except Exception as error:  # network clients raise what is no OSError
            if not is_lost(error):
                raise
            retry.failed(error)


def _position(groups: Sequence[int] | None, group: int, place: Place) -> int:
    return group if groups is None else groups.index(group, place.group)


def _chunks(
    file: DataFile, spec: SourceSpec, start: Place, groups: Sequence[int] | None, chunk_rows: int
) -> Iterator[Chunk]:
    if file.kind == "tokens":
        yield from _token_chunks(file, start, chunk_rows)
        return
    if file.kind == "builtin":
        yield from _in_chunks(iter(builtin_documents(file.size)), start, chunk_rows)
        return
    with file.open() as raw:
        if file.kind == "parquet":
            yield from _parquet_chunks(raw, file, spec.text_column, start, groups, chunk_rows)
        elif file.kind == "text":
            yield from _in_chunks(_documents(raw), start, chunk_rows)
        else:
            yield from _in_chunks(_lines(raw, file.compression), start, chunk_rows)


def _parquet(raw: BinaryIO, file: DataFile, column: str) -> pyarrow.parquet.ParquetFile:
    try:
        table = pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER, metadata=_footers.get(file))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise _Broken(f"no readable parquet file: {reason_of(error)}") from None
    except OSError as error:
        if is_lost(error):
            raise
        raise _Broken(f"no readable parquet file: {reason_of(error)}") from None
    if file not in _footers:
        while len(_footers) >= _FOOTERS:
            _footers.pop(next(iter(_footers)), None)
        _footers[file] = table.metadata
    schema = table.schema_arrow
    if column not in schema.names:
        raise _Broken(f"no column {column!r} (--text_column): it has {', '.join(map(repr, schema.names))}")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise _Broken(f"no strings in column {column!r} (--text_column): it is {kind}")
    return table


def _parquet_chunks(
    raw: BinaryIO, file: DataFile, column: str, start: Place, groups: Sequence[int] | None, chunk_rows: int
) -> Iterator[Chunk]:
    table = _parquet(raw, file, column)
    with table:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        order = range(len(sizes)) if groups is None else groups
        for position in range(start.group, len(order)):
            group = order[position]
            skip = start.number if position == start.group else 0
            if skip * chunk_rows >= sizes[group]:
                continue
            batches = table.iter_batches(chunk_rows, row_groups=[group], columns=[column], use_threads=False)
            values = islice(_values(batches), skip * chunk_rows, None)
            for index in range(skip, -(-sizes[group] // chunk_rows)):
                check_stop()
                try:
                    rows = list(islice(values, chunk_rows))
                except (pyarrow.ArrowException, OSError) as error:
                    if is_lost(error):
                        raise
                    # The other groups lie elsewhere in the file.
                    reason = f"damaged row group: {group}: {reason_of(error)}"
                    raise _Broken(reason, position + 1) from None
                yield Chunk(group, index, sum(sizes[:group]) + index * chunk_rows, rows)
                if len(rows) < min(chunk_rows, sizes[group] - index * chunk_rows):
                    reason = f"damaged row group: {group}: has fewer rows than the {sizes[group]} of its footer"
                    raise _Broken(reason, position + 1)


def _values(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Any]:
    for batch in batches:
        try:
            yield from batch.column(0).to_pylist()
        except UnicodeDecodeError:
            yield from map(_value, batch.column(0))


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return BrokenRow("text is not UTF-8")


def _in_chunks(rows: Iterator[Any], start: Place, chunk_rows: int) -> Iterator[Chunk]:
    for index in range(1 << 62):
        check_stop()
        part: list[Any] = []
        broken = None
        try:
            for row in islice(rows, chunk_rows):
                part.append(row)
        except UnicodeDecodeError:
            broken = "text is not UTF-8"
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            if is_lost(error):
                raise
            broken = f"damaged or cut off in its compressed data: {reason_of(error)}"
        if part and index >= start.number:
            yield Chunk(0, index, index * chunk_rows, part)
        if broken is not None:
            raise _Broken(broken)
        if len(part) < chunk_rows:
            return


def _documents(raw: BinaryIO) -> Iterator[str]:
    # With or without the byte order mark of Windows' editors.
    text = io.TextIOWrapper(raw, encoding="utf-8-sig")
    return (document for document in split_text(text.read) if not document.isspace() and document)


def _token_chunks(file: DataFile, start: Place, chunk_rows: int) -> Iterator[Chunk]:
    try:
        tokens = TokenFile(file.path)
        for first in range(start.number * chunk_rows, len(tokens), chunk_rows):
            check_stop()
            yield Chunk(0, first // chunk_rows, first, tokens.documents(first, first + chunk_rows))
    except ValueError as error:
        raise _Broken(f"damaged tokens: {error}") from None


def _lines(raw: BinaryIO, compression: str | None) -> Iterator[bytes]:
    if compression is None:
        yield from raw
        return
    if compression == "gzip":
        # read1: what lies before a cut is handed out before the cut is an error.
        read = gzip.GzipFile(fileobj=raw, mode="rb").read1
    else:
        read = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression).read
    rest = b""
    while block := read(_BLOCK):
        parts = (rest + block).split(b"\n")
        rest = parts.pop()
        yield from parts
    if rest:
        yield rest
