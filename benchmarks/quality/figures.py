"""Loss against FLOPs per token, and what every option changes."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.methods import CURVES, ROWS

_SHOWN_PARENT = "forward, neurons, 1/2"
_EQUAL = {"equal_flops": "equal FLOPs", "equal_tokens": "equal tokens"}


class Point(NamedTuple):
    """A row of the table: FLOPs per token beside dense training, loss, and its standard error."""

    name: str
    flops: float
    loss: float
    error: float


class Series(NamedTuple):
    """Points under one label of the legend; several are a curve."""

    label: str
    equal: str
    points: list[Point]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels; bars are standard errors over the seeds."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _losses(left, rows)
    _options(right, rows)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def series(rows: list[dict[str, Any]]) -> list[Series]:
    """What the left panel shows: every row that varies no other, once at equal FLOPs; curves at equal tokens too."""
    main = {row["name"]: row for row in rows if not row["parent"]}
    shown = []
    for equal, (label, names) in ((equal, curve) for equal in _EQUAL for curve in CURVES.items()):
        there = [main[name] for name in names if name in main and main[name][equal]]
        if len(there) > 1 or (there and equal == "equal_flops"):
            points = sorted((_point(row, equal) for row in there), key=lambda point: point.flops)
            shown.append(Series(label, equal, points))
    on_curves = {name for names in CURVES.values() for name in names}
    shown += [
        Series(name, "equal_flops", [_point(row, "equal_flops")]) for name, row in main.items() if name not in on_curves
    ]
    return shown


def changes(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """What the right panel shows, worst first: a row, the change of the loss it varies, and its standard error."""
    mine = [(row["name"], *row["equal_flops_beside_parent"]) for row in rows if row["parent"] == _SHOWN_PARENT]
    return sorted(mine, key=lambda change: -change[1])


def _point(row: dict[str, Any], equal: str) -> Point:
    return Point(row["name"], row["flop_ratio"], *row[equal])


def _losses(axes: Axes, rows: list[dict[str, Any]]) -> None:
    colors = colormaps["tab20"].colors
    for number, shown in enumerate(series(rows)):
        is_curve = len(shown.points) > 1
        axes.errorbar(
            [point.flops for point in shown.points],
            [point.loss for point in shown.points],
            [point.error for point in shown.points],
            ls={"equal_flops": "-", "equal_tokens": ":"}[shown.equal] if is_curve else "",
            marker="o" if is_curve else "s",
            ms=4 if is_curve else 5,
            capsize=3,
            color=colors[(2 * number + number // 10) % 20],
            label=f"{shown.label}, {_EQUAL[shown.equal]}",
        )
        if shown.label == "dense":
            axes.axhline(shown.points[0].loss, color="grey", lw=0.8)
    axes.set_xlabel("FLOPs per token, dense training is 1")
    axes.set_ylabel("validation loss of the full model, nats")
    # Below: anywhere in the panel it would hide points.
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.11))


def _options(axes: Axes, rows: list[dict[str, Any]]) -> None:
    mine = changes(rows)
    for at, (_, change, error) in enumerate(mine):
        color = "C2" if change < 0 else "C3"
        axes.errorbar(change, at, xerr=error, marker="o", ms=4, capsize=3, color=color)
    axes.set_yticks(range(len(mine)), [ROWS[name].variant or name for name, *_ in mine], fontsize=8)
    axes.axvline(0.0, color="grey", lw=0.8)
    axes.set_xlabel(f"change of the loss of '{_SHOWN_PARENT}' at equal FLOPs, nats")
