"""Estimates as a table for a terminal."""

from collections.abc import Callable, Sequence

from deepspeed_sdp.estimate.estimator import Estimate
from deepspeed_sdp.estimate.ledger import KINDS
from deepspeed_sdp.estimate.strategies import name_of

_Column = tuple[str, Callable[[Estimate], float], str]

_COLUMNS: tuple[_Column, ...] = (
    *((kind, lambda e, kind=kind: e.largest[kind] / 1e9, "{:.2f}") for kind in KINDS),
    ("peak", lambda e: e.peak / 1e9, "{:.2f}"),
    ("PFLOP", lambda e: e.step_flops / 1e15, "{:.3f}"),
    ("sent", lambda e: sum(e.sent.values()) / 1e9, "{:.2f}"),
    ("exposed", lambda e: e.time.exposed * 1e3, "{:.1f}"),
    ("step ms", lambda e: e.time.total * 1e3, "{:.1f}"),
)
_MARKED = ("peak", "PFLOP", "sent", "step ms")


def to_table(estimates: Sequence[Estimate], own: Sequence[Estimate] = ()) -> str:
    """One line for each; ``own`` ones, a job's own settings, come first and are marked ``>``.

    A ``*`` marks the best of a column among those that fit, ``does not fit`` what exceeds the GPU's memory. GB (10⁹
    bytes) of the heaviest rank, the most of each kind, and of all together at one moment; PFLOP, GB sent and
    milliseconds per step.
    """
    rows = [*own, *estimates]
    fitting = [row for row in rows if row.fits]
    best = {
        title: min((value(row) for row in fitting), default=None) for title, value, _ in _COLUMNS if title in _MARKED
    }
    lines = [["strategy", "ZeRO", *(title for title, _, _ in _COLUMNS), ""]]
    for index, row in enumerate(rows):
        cells = [("> " if index < len(own) else "") + name_of(row.job), str(row.job.stage)]
        for title, value, form in _COLUMNS:
            is_best = row.fits and title in best and value(row) == best[title]
            cells.append(form.format(value(row)) + ("*" if is_best else " "))
        lines.append([*cells, "" if row.fits else "does not fit"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    *numbers, last = rest
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers), last[0]]).rstrip()
