"""What command lines share: how options are spelt (``--seq-length`` is ``--seq_length``), and those of every job."""

import argparse
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from deepspeed_sdp.errors import ConfigError


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

    def print_help(self, file: Any = None) -> None:
        """As ``argparse`` does, on rank 0."""
        if not int(os.environ.get("RANK", "0")):
            super().print_help(file)

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


def split_settings(args: Sequence[str], known: Collection[str] = ()) -> tuple[list[str], list[tuple[str, str]]]:
    """``args`` without what is typed as ``--SECTION.KEY VALUE`` (or ``=VALUE``), and that: ``("SECTION.KEY", VALUE)``.

    ``known`` options stay.

    Raises:
        ValueError: there is no value.
    """
    left: list[str] = []
    settings: list[tuple[str, str]] = []
    end = list(args).index("--") if "--" in args else len(args)
    rest = iter(args[:end])
    for text in rest:
        name, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or "." not in name or f"--{name.replace('-', '_')}" in known:
            left.append(text)
            continue
        found = value if equals else next(rest, None)
        if found is None or (not equals and found.startswith("--")):
            raise ValueError(f"--{name}: got nothing; takes a value")
        settings.append((name.replace("-", "_"), found))
    return [*left, *args[end:]], settings


def add_dry_run(group: argparse._ActionsContainer) -> None:
    """``--dry_run`` and ``--world_size``."""
    group.add_argument(
        "--dry_run", action="store_true", help="say what would be done, and end; one process does, without a launcher"
    )
    group.add_argument(
        "--world_size",
        type=int,
        metavar="N",
        help="of --dry_run: on so many ranks (default: those launched, or the SDP block's num_subnetworks)",
    )


def dry_world_size(args: argparse.Namespace, num_subnetworks: int | None) -> int:
    """Ranks of a job that is only described."""
    return args.world_size or int(os.environ.get("WORLD_SIZE", "0")) or num_subnetworks or 1


def check_values(args: argparse.Namespace, takes: Mapping[str, tuple[bool, str]]) -> None:
    """Whether options have values that can be, those of :func:`add_dry_run` among them.

    Args:
        takes: by option, whether its value is one, and what it takes.

    Raises:
        ConfigError: names the option.
    """
    is_world_size = args.world_size is None or (args.dry_run and args.world_size >= 1)
    of_dry_run = (is_world_size, "a number from 1 on, with --dry_run; a job has the ranks that were launched")
    for name, (is_fine, what) in {**takes, "world_size": of_dry_run}.items():
        if not is_fine:
            raise ConfigError(f"--{name}: got {getattr(args, name)}; takes {what}")
