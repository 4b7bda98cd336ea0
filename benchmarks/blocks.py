"""Places in documents for what commands write: between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from deepspeed_sdp.errors import OutputError


def fill(document: Path, tables: Mapping[str, str]) -> None:
    """Replace what stands between the comments of each block.

    Raises:
        OutputError: the document, or a pair of comments in it, is missing.
    """
    try:
        text = document.read_text()
    except OSError as error:
        raise OutputError(f"{document}: {error.strerror}") from None
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise OutputError(f"{document}: takes a place for the table, between the lines {begin} and {end}")
        # A command at its beginning is indented.
        body = table.strip("\n")
        text = f"{before}{begin}\n\n{body}\n\n{end}{after}"
    atomically(document, lambda staging: staging.write_text(text) and None)


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, which takes its place when it is whole."""
    staging = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(staging)
        os.replace(staging, path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None
    finally:
        staging.unlink(missing_ok=True)
