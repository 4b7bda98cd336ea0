"""Loss against coverage, and what every option changes."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_CURVES = {"neurons": "forward, neurons", "blocks": "forward, blocks"}
_SHOWN_PARENT = "forward, neurons, 1/2"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels; bars are standard errors over the seeds."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _coverage(left, rows)
    _options(right, rows)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _coverage(axes: Axes, rows: list[dict[str, Any]]) -> None:
    dense = next(row for row in rows if row["name"] == "dense")
    for equal, style in (("equal_flops", "-"), ("equal_tokens", ":")):
        for label, start in _CURVES.items():
            points = {row["method"]["sdp"]["coverage"]: row[equal] for row in rows if _is_on(row, start) and row[equal]}
            points[1.0] = dense["equal_flops"]
            if len(points) > 1:
                xs = sorted(points)
                axes.errorbar(
                    xs,
                    [points[x][0] for x in xs],
                    [points[x][1] for x in xs],
                    ls=style,
                    marker="o",
                    ms=4,
                    capsize=3,
                    label=f"forward masking of {label}, {equal.replace('_', ' ').replace('flops', 'FLOPs')}",
                )
    others = [row for row in rows if not row["parent"] and not any(_is_on(row, start) for start in _CURVES.values())]
    for at, row in enumerate(row for row in others if row is not dense):
        # Beside each other where they have the same coverage.
        coverage = row["method"]["sdp"]["coverage"] + 0.008 * at
        axes.errorbar(
            coverage, *row["equal_flops"], marker="s", ms=5, capsize=3, ls="", label=f"{row['name']}, equal FLOPs"
        )
    axes.axhline(dense["equal_flops"][0], color="grey", lw=0.8)
    axes.set_xlabel("coverage")
    axes.set_ylabel("validation loss of the full model, nats")
    axes.legend(frameon=False, fontsize=7)


def _is_on(row: dict[str, Any], start: str) -> bool:
    """Whether a row is a point of a curve: not a variant, and not with another batch."""
    return not row["parent"] and row["name"].startswith(start) and not row["method"]["sequences"]


def _options(axes: Axes, rows: list[dict[str, Any]]) -> None:
    mine = [row for row in rows if row["parent"] == _SHOWN_PARENT]
    mine.sort(key=lambda row: -row["equal_flops_beside_parent"][0])
    for at, row in enumerate(mine):
        change, error = row["equal_flops_beside_parent"]
        color = "C2" if change < 0 else "C3"
        axes.errorbar(change, at, xerr=error, marker="o", ms=4, capsize=3, color=color)
    axes.set_yticks(range(len(mine)), [row["name"].removeprefix(f"{_SHOWN_PARENT}; ") for row in mine], fontsize=8)
    axes.axvline(0.0, color="grey", lw=0.8)
    axes.set_xlabel(f"change of the loss of '{_SHOWN_PARENT}' at equal FLOPs, nats")
