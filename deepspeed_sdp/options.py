"""How options are spelt, on every command line of this package: ``--seq_length``, and ``--seq-length`` is the same."""

import argparse
from collections.abc import Sequence
from typing import Any


class OptionParser(argparse.ArgumentParser):
    """Options are declared with underscores, as DeepSpeed's and transformers' are, and may be typed with dashes.

    They are not abbreviated: ``--dry`` would mean another option as soon as there are two that begin so.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ``argparse`` does, whose ``parse_args`` and subcommands come here too."""
        if args is None:
            import sys

            args = sys.argv[1:]
        return super().parse_known_args(spelt(args), namespace)


def spelt(args: Sequence[str]) -> list[str]:
    """``args`` with underscores in the names of options; what stands behind ``=`` or a bare ``--`` stays."""
    end = list(args).index("--") if "--" in args else len(args)
    return [_spelt(text) if index < end else text for index, text in enumerate(args)]


def _spelt(text: str) -> str:
    if not text.startswith("--"):
        return text
    name, equals, value = text[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
