"""Places in documents for what commands write: between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""

from collections.abc import Mapping
from pathlib import Path

from deepspeed_sdp.cli.options import written
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
    written(document, lambda path: path.write_text(text, encoding="utf-8"))
