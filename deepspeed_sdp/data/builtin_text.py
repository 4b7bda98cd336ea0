"""Real text that every Python installation carries: the language reference and the docstrings of what is installed.

As a source it is called ``builtin``, or ``builtin:20`` for 20 MB of it. Docstrings are read from source files with
``ast``; nothing is imported, so nothing runs.
"""

import ast
import functools
import hashlib
import inspect
import math
import platform
import re
import sysconfig
import textwrap
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from deepspeed_sdp.errors import DataError

NAME = "builtin"
MIN_BYTES = 2_000_000
_MEGABYTES = 8.0

# In this order until the size asked for is reached; what is not installed is passed over.
_PACKAGES = (
    "torch", "numpy", "pandas", "matplotlib", "datasets", "accelerate", "deepspeed", "sympy", "networkx",
    "huggingface_hub", "pydantic", "hypothesis", "transformers", "pyarrow", "fsspec", "httpx", "aiohttp", "mpmath",
    "setuptools", "pip", "jinja2", "rich", "yaml", "psutil", "PIL", "pytest", "mypy", "dill", "multiprocess",
)  # fmt: skip
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "__pycache__", "_vendor"}
_MIN_CHARACTERS = 200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_BLANK_LINES = re.compile(r"\n{3,}")
# Docstrings repeat one another, and what is held out would be trained on elsewhere. So many words in a row, or a
# paragraph of fewer words and so many characters, stand in one document only.
_RUN_WORDS = 13
_RUN_CHARACTERS = 60
# Templates differ in numbers and signs only.
_WORD = re.compile(r"[^\W\d_]+")


def megabytes(path: str) -> float | None:
    """The size that a source asks for; ``None`` if it is not the built-in text.

    Raises:
        DataError: what stands after the colon is no size.
    """
    name, colon, size = path.partition(":")
    if name != NAME:
        return None
    if not colon:
        return _MEGABYTES
    try:
        value = float(size)
    except ValueError:
        value = math.nan
    if not MIN_BYTES <= value * 1e6 < math.inf:
        raise DataError(f"{path}: takes {NAME}:MB, a size in megabytes from {MIN_BYTES / 1e6:g} on, or {NAME} alone")
    return value


def stamp() -> str:
    """Changes with what is installed of the packages that it is from."""
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    versions = {name: installed.get(name.lower()) for name in _PACKAGES}
    return hashlib.sha256(repr((platform.python_version(), versions)).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def builtin_documents(max_bytes: int = int(_MEGABYTES * 1e6)) -> tuple[str, ...]:
    """Cleaned documents of at least 200 characters, in a fixed order, up to ``max_bytes`` of UTF-8.

    Paragraphs that repeat an earlier document are left out, and documents that mostly do.

    Raises:
        DataError: this installation holds less than 2 MB of such text.
    """
    documents: list[str] = []
    seen: set[int] = set()
    size = 0
    for raw in _raw_documents():
        whole = clean(raw)
        text, runs = _new_part(whole, seen)
        if len(text) < max(_MIN_CHARACTERS, len(whole) / 2) or not _is_prose(text):
            continue
        seen |= runs
        documents.append(text)
        size += len(text.encode())
        if size >= max_bytes:
            break
    if size < MIN_BYTES:
        raise DataError(
            f"built-in text: found {size / 1e6:.1f} MB in this Python installation; needs {MIN_BYTES / 1e6:g} MB: give "
            "text files instead"
        )
    return tuple(documents)


def clean(text: str) -> str:
    """Unindent, drop control characters and trailing blanks, and keep at most one blank line in a row."""
    text = _CONTROL.sub("", inspect.cleandoc(text.replace("\r\n", "\n").replace("\t", "    ")))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    return letters > 0.6 * len(text) and _encodes(text)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, escaped in the source
        return False
    return True


def _new_part(text: str, seen: set[int]) -> tuple[str, set[int]]:
    """The paragraphs of ``text`` that share no run of words with what was ``seen``, and their runs."""
    found = [(paragraph, _runs(paragraph)) for paragraph in text.split("\n\n")]
    new = [(paragraph, runs) for paragraph, runs in found if seen.isdisjoint(runs)]
    # What is left of an indented text must not begin in the middle of it.
    part = textwrap.dedent("\n\n".join(paragraph for paragraph, _ in new)).strip()
    return part, set().union(*(runs for _, runs in new))


def _runs(paragraph: str) -> set[int]:
    """Checksums, which are the same in every process, unlike Python's hashes."""
    words = _WORD.findall(paragraph.lower())
    if len(words) < _RUN_WORDS and len(paragraph) < _RUN_CHARACTERS:
        return set()
    starts = range(max(len(words) - _RUN_WORDS, 0) + 1)
    return {zlib.crc32(" ".join(words[start : start + _RUN_WORDS]).encode()) for start in starts}


def _raw_documents() -> Iterator[str]:
    import pydoc_data.topics

    yield from (pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    yield from _docstrings(Path(sysconfig.get_paths()["stdlib"]))
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from _docstrings(Path(folder))


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            yield from _docstrings_of(path)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Breadth first, statements only: expressions hold no definitions and are most of a tree."""
    queue: deque[ast.AST] = deque([tree])
    while queue:
        node = queue.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, name, None)
            if isinstance(children, list):
                queue.extend(children)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's source
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= _MIN_CHARACTERS:
                yield text
