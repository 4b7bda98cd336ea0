"""Options of commands that train: those of a run, made from its schema, and those of a job.

Imports nothing heavy, so that ``--help`` answers at once.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from pydantic.fields import FieldInfo

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.options import add_dry_run, check_values, split_settings
from deepspeed_sdp.pretraining.schema import SECTIONS, RunSchema, choices, fields, kinds

# ``--data DIR`` says ``data.path``; keys of these are options of their own too: ``--steps``.
_SHORT = ("model", "data", "length", "logging")
_METAVARS = {dict: "X", int: "N", float: "X", str: "TEXT"}


class _Set(argparse.Action):
    """Notes what was typed, by the key that it is for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.settings = [*(namespace.settings or []), (self.dest, values)]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--SECTION.KEY`` for every value of a run, as settings of ``args.settings``; see :func:`parse_run`."""
    groups: dict[str, Any] = {}
    for name, field in fields():
        section = name.split(".")[0]
        if section not in groups:
            about = RunSchema.model_fields[SECTIONS[section]].description
            groups[section] = parser.add_argument_group(section, about)
        known, among = kinds(field.annotation), choices(field.annotation)
        words: dict[str, Any] = {"metavar": "|".join(among)} if among else {"metavar": _metavar(known)}
        if tuple in known:
            words["nargs"] = "+"
        if known == {bool}:
            words = {"metavar": "true|false", "nargs": "?", "const": "true"}
        groups[section].add_argument(
            *_spellings(name), dest=name, action=_Set, default=argparse.SUPPRESS, help=_help(field), **words
        )
    parser.set_defaults(settings=None)
    group = parser.add_argument_group("deepspeed", RunSchema.model_fields["deepspeed"].description)
    group.add_argument(
        "--deepspeed.KEY",
        dest="deepspeed",
        metavar="JSON",
        default=argparse.SUPPRESS,
        help="any key, as --deepspeed.optimizer.params.lr 1e-3",
    )


def _spellings(name: str) -> list[str]:
    section, _, key = name.partition(".")
    short = [] if section not in _SHORT else [f"--{section}"] if key == "path" else [f"--{key}"]
    return [*short, f"--{name}"]


def _metavar(known: set[Any]) -> str:
    return next((text for kind, text in _METAVARS.items() if kind in known), "JSON")


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.is_required() or field.default in (None, ()) or "default:" in text:
        return text
    default = field.default
    shown = (
        str(default).lower()
        if isinstance(default, bool)
        else " ".join(default)
        if isinstance(default, tuple)
        else default
    )
    return f"{text} (default: {shown})"


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """What of a job is no part of its run: where to, from where on, how loud."""
    job = parser.add_argument_group("job")
    job.add_argument(
        "--output_dir",
        metavar="DIR",
        help="gets hf/, checkpoints/, metrics.jsonl, report.json, report.md, loss.png, plan.png",
    )
    job.add_argument(
        "--restart", action="store_true", help="begin anew; without it a job goes on from its latest checkpoint"
    )
    job.add_argument(
        "--stop_file", metavar="FILE", help="written when the job saved because it was asked to stop, for its scheduler"
    )
    job.add_argument(
        "--elastic",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        help="go on without ranks that are killed, from the state that is kept in memory every N steps (10)",
    )
    job.add_argument(
        "--elastic_folder",
        metavar="DIR",
        default="/dev/shm",
        help="where each node keeps it (default: /dev/shm, its memory)",
    )
    add_dry_run(job)
    job.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log")


def parse_run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """``argv`` with all that is typed as ``--SECTION.KEY VALUE`` in ``args.settings``, in any place.

    Settings: pairs of the key and its value, or several words of a list.
    """
    known = {option for name, _ in fields() for option in _spellings(name)}
    try:
        left, others = split_settings(argv, known)
    except ValueError as error:
        parser.error(str(error))
    args = parser.parse_args(left)
    args.settings = [*(getattr(args, "settings", None) or []), *others]
    return args


def check_job_options(args: argparse.Namespace, source: str | None) -> None:
    """Whether a job's options fit each other.

    Args:
        source: of its data; ``None``: no one says.

    Raises:
        ConfigError: names the option.
    """
    if not args.dry_run and source is None:
        raise ConfigError(
            "--data, --stream or --text: got none; takes one (--text builtin: Python's own documentation), or --dry_run"
        )
    if not args.dry_run and not args.output_dir:
        raise ConfigError("--output_dir: got none; takes one, or --dry_run")
    check_values(args, {"elastic": (args.elastic is None or args.elastic >= 1, "a number of steps from 1 on")})
