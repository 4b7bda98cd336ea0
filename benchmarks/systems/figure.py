"""Memory against time of every contender, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tables import Results, Row, measured, seconds

COLOURS = {"1/4": "tab:green", "1/2": "tab:blue", "3/4": "tab:purple", "1": "black"}
MARKERS = {
    ("forward", "neuron"): "o",
    ("forward", "layer"): "s",
    ("backward", "neuron"): "^",
    ("backward", "layer"): "v",
}


def plot(results: Results, path: Path) -> None:
    """Write a PNG or SVG: one mark per contender, those of SDP by coverage and masking, all others by name."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots()
    for row in measured(results):
        x, y = seconds(row), row["memory"]["peak"] / 1e6
        if row["system"] == "sdp":
            colour, marker = COLOURS[row["coverage"]], MARKERS[row["masking"], row["granularity"]]
            face = "white" if row["checkpointing"] else colour
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, ms=7, alpha=0.85)
            axes.annotate(str(row["stage"]), (x, y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
        else:
            axes.plot(x, y, "D", color="tab:red", ms=7)
            axes.annotate(_label(row), (x, y), (6, -3), textcoords="offset points", fontsize=8, color="tab:red")
    axes.set_xlabel("seconds per step, median")
    axes.set_ylabel("peak memory of a rank, MB")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=_legend(), frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def _label(row: Row) -> str:
    return row["contender"].replace("DeepSpeed ", "").replace(" + checkpointing", " + ckpt")


def _legend() -> list[Line2D]:
    def mark(marker: str, colour: str, label: str, face: str | None = None) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, markerfacecolor=face or colour, label=label)

    return [
        mark("D", "tab:red", "full model, sharded or not"),
        *[mark("o", colour, f"SDP, coverage {coverage}") for coverage, colour in COLOURS.items()],
        *[mark(marker, "grey", f"SDP, {masking} masking, {unit}s") for (masking, unit), marker in MARKERS.items()],
        mark("o", "grey", "SDP with checkpointing", "white"),
        Line2D([], [], ls="", label="number: ZeRO stage"),
    ]
