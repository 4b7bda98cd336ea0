"""How options are spelt, on every command line of this package: ``--seq_length``, and ``--seq-length`` is the same."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn


class OptionParser(argparse.ArgumentParser):
    """Options are declared with underscores, as DeepSpeed's and transformers' are, and may be typed with dashes.

    They are not abbreviated: ``--dry`` would mean another option as soon as there are two that begin so. Rank 0 speaks
    for all ranks of a job, which are given the same command line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ``argparse`` does, whose ``parse_args`` and subcommands come here too."""
        return super().parse_known_args(spelt(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str) -> NoReturn:
        """As ``argparse`` does, on rank 0."""
        if int(os.environ.get("RANK", "0")):
            time.sleep(2.0)  # the launcher ends rank 0 when this one ends
            sys.exit(2)
        super().error(message)


def spelt(args: Sequence[str]) -> list[str]:
    """``args`` with underscores in the names of options; what stands behind ``=`` or a bare ``--`` stays."""
    end = list(args).index("--") if "--" in args else len(args)
    return [_spelt(text) if index < end else text for index, text in enumerate(args)]


def _spelt(text: str) -> str:
    if not text.startswith("--"):
        return text
    name, equals, value = text[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def split_settings(args: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """``args`` without what is typed as ``--SECTION.KEY VALUE`` (or ``=VALUE``), and that: ``("SECTION.KEY", VALUE)``.

    Raises:
        ValueError: there is no value.
    """
    left: list[str] = []
    settings: list[tuple[str, str]] = []
    end = list(args).index("--") if "--" in args else len(args)
    rest = iter(args[:end])
    for text in rest:
        name, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or "." not in name:
            left.append(text)
            continue
        found = value if equals else next(rest, None)
        if found is None or (not equals and found.startswith("--")):
            raise ValueError(f"--{name}: got nothing; takes a value")
        settings.append((name.replace("-", "_"), found))
    return [*left, *args[end:]], settings
