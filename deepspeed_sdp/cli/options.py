"""Kinds of option values, and what several subcommands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deepspeed_sdp.config import read_coverage
from deepspeed_sdp.errors import OutputError
from deepspeed_sdp.files import replacing

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def coverage(text: str) -> float:
    """``0.5`` or ``1/2``."""
    return float(read_coverage(text))


def listed(convert: Callable[[str], Any]) -> Any:
    """``a,b,c`` as a list of ``convert``."""

    def parse(text: str) -> list[Any]:
        return [convert(part.strip()) for part in text.split(",")]

    parse.__name__ = f"list of {convert.__name__}"
    return parse


def per_kind(convert: Callable[[str], Any]) -> Any:
    """One value, or ``kind=value,kind=value``."""

    def parse(text: str) -> Any:
        if "=" not in text:
            return convert(text)
        pairs = [(kind.strip(), value) for kind, _, value in (part.partition("=") for part in text.split(","))]
        kinds = [kind for kind, _ in pairs]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise argparse.ArgumentTypeError(f"got {', '.join(twice)} twice in {text!r}; takes each kind once")
        return {kind: convert(value) for kind, value in pairs}

    parse.__name__ = convert.__name__
    return parse


def written(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file; it takes the place of ``path`` when it is whole.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with replacing(path) as new:
            write(new)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for a suffix it does not know
        raise OutputError(f"cannot write {path}: {error}") from None
