"""Estimates as a table for a terminal."""

from collections.abc import Callable, Sequence

from deepspeed_sdp.estimate.estimator import Estimate
from deepspeed_sdp.estimate.ledger import KINDS
from deepspeed_sdp.estimate.strategies import Choice, name_of

_Column = tuple[str, Callable[[Estimate], float], str]

_ACTIVATIONS: _Column = ("activations", lambda e: e.largest["activations"] / 1e9, "{:.2f}")
_PEAK: _Column = ("peak", lambda e: e.peak / 1e9, "{:.2f}")
_STEP: _Column = ("step ms", lambda e: e.time.total * 1e3, "{:.1f}")
# Of the first variant, and of another one.
_COLUMNS: tuple[_Column, ...] = (
    *((kind, lambda e, kind=kind: e.largest[kind] / 1e9, "{:.2f}") for kind in KINDS if kind != "activations"),
    ("PFLOP", lambda e: e.step_flops / 1e15, "{:.3f}"),
    ("sent", lambda e: sum(e.sent.values()) / 1e9, "{:.2f}"),
    ("exposed", lambda e: e.time.exposed * 1e3, "{:.1f}"),
    _ACTIVATIONS,
    _PEAK,
    _STEP,
)
_AGAIN = (_ACTIVATIONS, _PEAK, _STEP)
_MARKED = ("peak", "PFLOP", "sent", "step ms")


def to_table(choices: Sequence[Choice], own: Sequence[Choice] = ()) -> str:
    """One line for each; ``own`` ones, a job's own settings, come first and are marked ``>``.

    The last columns stand once for every variant: without activation checkpointing, and with it (``ckpt``). A ``*``
    marks the best of a column among those that fit; ``does not fit`` what exceeds the GPU's memory either way. GB (10⁹
    bytes) of the heaviest rank, the most of each kind, and of all together at one moment; PFLOP, GB sent and
    milliseconds per step.
    """
    rows = [*own, *choices]
    variants = len(rows[0].variants) if rows else 1
    columns = [(0, column) for column in _COLUMNS] + [(i, column) for i in range(1, variants) for column in _AGAIN]
    best = [_best([row.variants[i] for row in rows], title, value) for i, (title, value, _) in columns]
    lines = [["strategy", "ZeRO", *(("ckpt " if i else "") + title for i, (title, *_) in columns), ""]]
    for index, row in enumerate(rows):
        cells = [("> " if index < len(own) else "") + name_of(row.job), str(row.job.stage)]
        for (i, (_, value, form)), least in zip(columns, best, strict=True):
            estimate = row.variants[i]
            cells.append(form.format(value(estimate)) + ("*" if estimate.fits and value(estimate) == least else " "))
        lines.append([*cells, _verdict(row)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_line(line, widths) for line in lines)


def _best(estimates: Sequence[Estimate], title: str, value: Callable[[Estimate], float]) -> float | None:
    return min((value(e) for e in estimates if e.fits), default=None) if title in _MARKED else None


def _verdict(choice: Choice) -> str:
    if all(estimate.fits for estimate in choice.variants):
        return ""
    return "fits with checkpointing" if choice.fits else "does not fit"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    *numbers, last = rest
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers), last[0]]).rstrip()
