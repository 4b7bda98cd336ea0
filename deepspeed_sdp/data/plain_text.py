"""Documents of plain text, a block at a time."""

import re
from collections.abc import Callable, Iterator

#: A document longer than ``_LONGEST`` characters is cut into pieces of at least half as many.
_LONGEST = 8192
_BLOCK = 1 << 16
_BREAK = re.compile(r"\n(?:[ \t]*\n){2,}|\f")
# Where a long document is cut, best first: after a paragraph, a line, a word.
_CUTS = (re.compile(r"\n[ \t]*\n"), re.compile(r"\n"), re.compile(r"\s"))


def split_text(read: Callable[[int], str]) -> Iterator[str]:
    """The documents of a text: what two or more blank lines, or a form feed, stand between.

    A long one, as a whole book, comes in pieces, so that a part of it can be held out by the rule for documents.

    Args:
        read: gives the next so many characters, and none at the end.
    """
    rest = ""
    while block := read(_BLOCK):
        # Blanks at the end may be the beginning of a break.
        known = len((rest + block).rstrip())
        text, blanks = (rest + block)[:known], (rest + block)[known:]
        *whole, rest = _BREAK.split(text)
        for document in whole:
            yield from _pieces(document)
        *cut, rest = _pieces(rest)
        yield from cut
        rest += blanks
    yield from _pieces(rest)


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > _LONGEST:
        end = _cut(document, start + _LONGEST // 2, start + _LONGEST)
        yield document[start:end]
        start = end
    yield document[start:]


def _cut(text: str, first: int, last: int) -> int:
    for kind in _CUTS:
        if found := kind.search(text, first, last):
            return found.end()
    return last
