"""The page of figures, from the rows: its text is written by hand, its tables stand between comments."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]

_BASELINE = "DeepSpeed ZeRO-1"
_BEGIN, _END = "<!-- begin gpu -->", "<!-- end gpu -->"


def write_page(rows: Rows, template: Path, page: Path) -> None:
    """``template`` with the tables of ``rows`` in their place, as ``page``; both may be the same file."""
    before, _, rest = template.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{_BEGIN}\n\n{tables(rows)}\n\n{_END}{after}", encoding="utf-8")


def tables(rows: Rows) -> str:
    """All rows as Markdown."""
    runs = {(row["command"], row["date"], row["device"], _versions(row)): None for row in rows}
    parts = [f"`{command}` on {date}: {device}, {versions}." for command, date, device, versions in runs]
    if any(row["device"] == "cpu" for row in rows):
        parts.append("At toy size on a CPU: these figures say that the checks run, and nothing of a GPU.")
    ended = [row for row in rows if row["state"] == "passed"]
    parts.append(f"{len(ended)} of {len(rows)} checks passed.")
    parts.append(_table(rows, {"check": lambda r: r["check"], "": _state, "s": _number("seconds", "{:.1f}")}))
    compared = [row for row in ended if "loss_difference" in row]
    columns = {
        "check": lambda r: r["check"],
        "losses": _number("loss_difference", "{:.1e}"),
        "norms": _number("norm_difference", "{:.1e}"),
        "weights": _number("weight_difference", "{:.1e}"),
        "similarity": _number("update_similarity", "{:.4f}"),
    }
    parts += _section("Largest differences to the simulation, or to the run before a resume", compared, columns)
    timed = [row for row in ended if "step_seconds" in row and "loss_difference" not in row]
    columns = {
        "check": lambda r: r["check"],
        "ms per step": _number("step_seconds", "{:.1f}", 1e3),
        "device's ms": _number("device_seconds", "{:.1f}", 1e3),
        "tokens/s": _number("tokens_per_second", "{:,.0f}"),
        "MFU": _number("mfu", "{:.3f}"),
        "peak GB": _number("peak", "{:.3f}", 1e-9),
        "step": _beside(timed, "step_seconds"),
        "device's": _beside(timed, "device_seconds"),
        "peak": _beside(timed, "peak"),
    }
    title = f"Step time of one worker of 8, waits for others left out; the last columns are ratios to {_BASELINE}"
    parts += _section(title, timed, columns)
    peaks = [row for row in ended if "estimated_peak" in row]
    columns = {
        "check": lambda r: r["check"],
        "measured GB": _number("peak", "{:.3f}", 1e-9),
        "estimated GB": _number("estimated_peak", "{:.3f}", 1e-9),
        "ratio": _number("estimated_over_measured", "{:.3f}"),
    }
    parts += _section("Peak memory beside the estimate", peaks, columns)
    saved = [row for row in ended if "stall" in row]
    columns = {
        "check": lambda r: r["check"],
        "training waits, ms": _number("stall", "{:.0f}", 1e3),
        "until it is saved, ms": _number("saved", "{:.0f}", 1e3),
        "loading, ms": _number("load", "{:.0f}", 1e3),
        "GB": _number("written", "{:.2f}", 1e-9),
    }
    return "\n\n".join([*parts, *_section("A checkpoint", saved, columns)])


def _versions(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["versions"].items() if value)


def _beside(rows: Rows, key: str) -> Callable[[dict[str, Any]], str]:
    """The ratio to the baseline of the same shape, which a check's name begins with."""
    baselines = {row["check"].split()[0]: row for row in rows if row["check"].endswith(_BASELINE)}

    def ratio(row: dict[str, Any]) -> str:
        baseline = baselines.get(row["check"].split()[0], {})
        return f"{row[key] / baseline[key]:.2f}" if row.get(key) and baseline.get(key) else ""

    return ratio


def _section(title: str, rows: Rows, columns: dict[str, Callable[[dict[str, Any]], str]]) -> list[str]:
    return [f"{title}:", _table(rows, columns)] if rows else []


def _table(rows: Rows, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows)])


def _state(row: dict[str, Any]) -> str:
    said = row.get("says", "").replace("|", "/")
    return f"{row['state']}: {said}" if said else str(row["state"])


def _number(key: str, form: str, factor: float = 1.0) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(key) is None else form.format(row[key] * factor)
