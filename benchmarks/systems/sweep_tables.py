"""Markdown of what :mod:`sweep` measured, beside what the formulas say."""

from collections.abc import Iterable, Sequence
from typing import Any

from tables import Results, Row, measured, seconds, spread

# Place on an axis of what is the same at every point of it.
EVERY = "every"
TITLES = {
    "size": "hidden size",
    "workers": "`N`, ranks",
    "coverage": "coverage",
    "coverage, backward": "coverage, backward masking",
    "sequence": "sequence length",
    "micro_batch": "micro-batch",
}


def sweep_table(sweeps: Sequence[Results]) -> str:
    """SDP beside dense ZeRO-1 along every axis but the link's.

    Ratios are SDP over dense at the same point; after the arrow what the formulas give. ``state`` is weights and
    optimizer, and ``sent`` the bytes of a step, as SDP's own measured figure over that of the formulas.
    """
    rows = [row for results in sweeps for row in measured(results) if row.get("axis") not in (None, "link")]
    lines = [
        "| axis | at | FLOPs: measured → formula | time (quartiles) → formula | peak memory | activations | "
        "sent MB → formula | state MB → formula |",
        "|---" * 8 + "|",
    ]
    for axis in TITLES:
        there = sorted(
            (row for row in rows if row["axis"] == axis and row["system"] == "sdp"), key=lambda row: _order(row["at"])
        )
        lines += [_sweep_line(axis, dense, sdp) for sdp in there if (dense := _dense(rows, sdp)) is not None]
    return "\n".join(lines) if len(lines) > 2 else ""


def link_table(results: Results) -> str:
    """Every contender at every rate: time, and what computing and sending one after the other would take."""
    rows = [row for row in measured(results) if row.get("axis") == "link"]
    free = {row["contender"]: row for row in rows if row["rate"] is None}
    rates = sorted({row["rate"] for row in rows if row["rate"] is not None}, reverse=True)
    if not rates or not free:
        return ""
    titles = ["unlimited", *[f"{rate / 1e6:g} MB/s" for rate in rates]]
    lines = [f"| | sent MB | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    fastest = {rate: min(seconds(row) for row in rows if row["rate"] == rate) for rate in (None, *rates)}
    for name, base in free.items():
        cells = [f"{base['sent'] / 1e6:.1f}", _bold(seconds(base), fastest[None])]
        for rate in rates:
            row = next((r for r in rows if r["rate"] == rate and r["contender"] == name), None)
            cells.append(_link_cell(row, base, rate, fastest[rate]) if row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest_on_links(results: Results) -> str:
    """Who is fastest at each rate, of all and of those that train the full model."""
    rows = [row for row in measured(results) if row.get("axis") == "link"]
    titles = ("link, each way", "fastest", "its s/step", "fastest of those that train the full model", "its s/step")
    lines = [f"| {' | '.join(titles)} |", "|---" * 5 + "|"]
    for rate in sorted({row["rate"] for row in rows}, key=lambda rate: -(rate or float("inf"))):
        there = sorted((row for row in rows if row["rate"] == rate), key=seconds)
        dense = [row for row in there if row["coverage"] == "1"]
        if dense:
            name = "unlimited" if rate is None else f"{rate / 1e6:g} MB/s"
            lines.append(
                f"| {name} | {there[0]['contender']} | {seconds(there[0]):.3f} | {dense[0]['contender']} | "
                f"{seconds(dense[0]):.3f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _sweep_line(axis: str, dense: Row, sdp: Row) -> str:
    ratios = [mine / other for mine, other in zip(sdp["seconds"], dense["seconds"], strict=False)]
    low, high = spread(ratios)
    predicted = sdp["predicted"]["flops"] / dense["predicted"]["flops"]
    state, formula = (sum(sdp[of][kind] for kind in ("weights", "optimizer")) for of in ("memory", "predicted"))
    cells = [
        TITLES[axis],
        str(sdp["at"]),
        f"{sdp['flops'] / dense['flops']:.3f} → {predicted:.3f}",
        f"{seconds(sdp) / seconds(dense):.2f} ({low:.2f} to {high:.2f}) → {predicted:.2f}",
        f"{sdp['memory']['peak'] / dense['memory']['peak']:.2f}",
        f"{sdp['memory']['largest_activations'] / dense['memory']['largest_activations']:.2f}",
        f"{sdp['sent'] / 1e6:.2f} → {sdp['predicted']['sent'] / 1e6:.2f}",
        f"{state / 1e6:.1f} → {formula / 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _link_cell(row: Row, base: Row, rate: float, fastest: float) -> str:
    return f"{_bold(seconds(row), fastest)} → {seconds(base) + base['sent'] / rate:.3f}"


def _bold(value: float, best: float) -> str:
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def _dense(rows: Iterable[Row], sdp: Row) -> Row | None:
    """What ``sdp`` is compared with: at the same point, or the one of an axis that does not change it."""
    axis = sdp["axis"].partition(",")[0]
    places = (sdp["at"], EVERY)
    found = (r for r in rows if r["system"] == "deepspeed" and r["axis"] == axis and r["at"] in places)
    return next(found, None)


def _order(at: Any) -> float:
    if isinstance(at, str) and "/" in at:
        top, _, bottom = at.partition("/")
        return int(top) / int(bottom)
    return float(at)
