"""Markdown of what :mod:`run` measured: all contenders, the best of each column in bold; and the few of a summary."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Results = dict[str, Any]

# What a reader weighs against each other, by name.
SUMMARY = (
    "DDP",
    "DDP + checkpointing",
    "FSDP2",
    "DeepSpeed ZeRO-1",
    "DeepSpeed ZeRO-3",
    "SDP forward neuron 3/4 ZeRO-1",
    "SDP forward neuron 1/2 ZeRO-1",
    "SDP forward neuron 1/2 ZeRO-1 + checkpointing",
    "SDP forward neuron 1/2 ZeRO-3",
    "SDP forward neuron 1/4 ZeRO-1",
    "SDP backward neuron 1/2 ZeRO-1",
)

# Of those, what the first page shows.
IN_SHORT = (
    "FSDP2",
    "DeepSpeed ZeRO-1",
    "SDP forward neuron 1/2 ZeRO-1",
    "SDP forward neuron 1/2 ZeRO-1 + checkpointing",
    "SDP forward neuron 1/4 ZeRO-1",
)

_OF_MEMORY = (
    "peak MB",
    "weights",
    "optimizer",
    "largest gradients",
    "largest activations",
    "rest at the peak",
    "GFLOP",
)


@dataclass(frozen=True)
class Column:
    """One figure of a row.

    Attributes:
        value: ``None`` where it was not measured.
        digits: of the text, after the point.
        best: which value is set in bold; ``None`` for none.
    """

    title: str
    value: Callable[[Row], float | None]
    digits: int
    best: Callable[[Sequence[float]], float] | None = min


def measured(results: Results) -> list[Row]:
    """Rows of contenders that ran."""
    return [row for row in results["rows"] if not row.get("reason")]


def seconds(row: Row) -> float:
    """Median time of a step."""
    return statistics.median(row["seconds"])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; the value itself where there is only one."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def share_of_ceiling(row: Row, results: Results) -> float:
    """FLOP/s of a rank over those of plain matmuls with all ranks at it."""
    return float(row["flops"] / seconds(row) / results["settings"]["matmul_ceiling"])


def columns(results: Results) -> list[Column]:
    """Of the table of all contenders."""
    # What faked peers send is nothing that could be learned from.
    is_faked = results["settings"]["faked_peers"]

    def memory(kind: str) -> Callable[[Row], float]:
        return lambda row: row["memory"][kind] / 1e6

    return [
        Column("peak MB", memory("peak"), 1),
        *[Column(kind, memory(kind), 1) for kind in ("weights", "optimizer")],
        *[Column(f"largest {kind}", memory(f"largest_{kind}"), 1) for kind in ("gradients", "activations")],
        Column("rest at the peak", memory("rest"), 1),
        Column("s/step", seconds, 3),
        Column("tokens/s", lambda row: row["tokens"] / seconds(row), 0, max),
        Column("GFLOP", lambda row: row["flops"] / 1e9, 1),
        Column("% of ceiling", lambda row: 100 * share_of_ceiling(row, results), 0, max),
        Column("sent MB", lambda row: row["sent"] / 1e6, 1),
        Column("on the wire MB", lambda row: None if row["wire"] is None else row["wire"] / 1e6, 1),
        Column("loss", lambda row: None if is_faked else row["losses"][0], 4, None),
    ]


def contender_table(results: Results, names: Sequence[str] | None = None) -> str:
    """All contenders, or those of ``names``. One that could not run has its reason in the place of figures.

    The best of a column is that of all contenders.
    """
    shown = columns(results)
    rows = measured(results)
    best = {column.title: _best(column, rows) for column in shown}
    lines = [_line(["", *[_title(column) for column in shown]]), "|---" * (len(shown) + 1) + "|"]
    for row in results["rows"]:
        if names is not None and row["contender"] not in names:
            continue
        if row.get("reason"):
            lines.append(_line([row["contender"], f"cannot run: {_escape(row['reason'])}", *[""] * (len(shown) - 1)]))
        else:
            lines.append(_line([row["contender"], *[_cell(column, row, best[column.title]) for column in shown]]))
    return "\n".join([*lines, "", loss_note(results)])


def memory_table(results: Results) -> str:
    """Memory and FLOPs alone, beside DDP and DeepSpeed's ZeRO-1, for runs too short for times."""
    rows = measured(results)
    peaks = {row["contender"]: row["memory"]["peak"] for row in rows}

    def beside(name: str) -> Callable[[Row], float | None]:
        return lambda row: row["memory"]["peak"] / peaks[name] if name in peaks else None

    kept = [column for column in columns(results) if column.title in _OF_MEMORY]
    shown = [*kept, *[Column(f"peak / {name}", beside(name), 2) for name in ("DDP", "DeepSpeed ZeRO-1")]]
    best = {column.title: _best(column, rows) for column in shown}
    lines = [_line(["", *[column.title for column in shown]]), "|---" * (len(shown) + 1) + "|"]
    lines += [_line([row["contender"], *[_cell(c, row, best[c.title]) for c in shown]]) for row in rows]
    return "\n".join(lines)


def summary_table(results: Results, names: Sequence[str] = SUMMARY) -> str:
    """A few contenders beside DDP, as ratios of what DDP takes."""
    rows = {row["contender"]: row for row in measured(results)}
    if "DDP" not in rows:
        return "DDP was not measured: nothing to compare with."
    base = rows["DDP"]
    shown = [
        Column("peak memory", lambda row: row["memory"]["peak"] / base["memory"]["peak"], 2),
        Column("time", lambda row: seconds(row) / seconds(base), 2),
        Column("FLOPs", lambda row: row["flops"] / base["flops"], 2),
        Column("sent", lambda row: row["sent"] / base["sent"] if base["sent"] else None, 2),
    ]
    picked = [rows[name] for name in names if name in rows]
    best = {column.title: _best(column, picked) for column in shown}
    lines = [_line(["DDP = 1", *[column.title for column in shown]]), "|---" * (len(shown) + 1) + "|"]
    lines += [_line([row["contender"], *[_cell(c, row, best[c.title]) for c in shown]]) for row in picked]
    return "\n".join(lines)


def loss_note(results: Results) -> str:
    """How far the losses of those that compute the same lie apart."""
    losses = {row["contender"]: row["losses"][0] for row in measured(results) if row["coverage"] == "1"}
    if len(losses) < 2 or results["settings"]["faked_peers"]:
        return ""
    apart = max(losses.values()) - min(losses.values())
    return f"The {len(losses)} contenders that train the full model have the same loss to within {apart:.1e}."


def settings_note(results: Results) -> str:
    """The command, and what it ran on."""
    about = results["settings"]
    hardware, options, versions = about["hardware"], about["options"], about["versions"]
    machine = f"{hardware['cores']} cores of {hardware['cpu']}"
    if "accelerator" in hardware:
        machine = f"{hardware['accelerators']} x {hardware['accelerator']}, {machine}"
    peers = ", all but one faked" if about["faked_peers"] else ""
    return (
        f"    {about['command']}\n\n"
        f"{about['date']}: {machine}; {about['ranks']} ranks{peers} over {about['backend']}, {about['network']}; "
        f"torch {versions['torch']}, DeepSpeed {versions['deepspeed']}. {options['precision']}, LLaMA with hidden size "
        f"{options['hidden_size']}, {options['layers']} layers, vocabulary {options['vocab_size']}; "
        f"{options['micro_batch']} x {options['sequence']} tokens per rank and step. One rank's matmul ceiling: "
        f"{about['matmul_ceiling'] / 1e9:.1f} GFLOP/s."
    )


def _best(column: Column, rows: Sequence[Row]) -> str | None:
    values = [value for value in map(column.value, rows) if value is not None]
    return f"{column.best(values):,.{column.digits}f}" if column.best and len(values) > 1 else None


def _cell(column: Column, row: Row, best: str | None) -> str:
    value = column.value(row)
    if value is None:
        return ""
    text = f"{value:,.{column.digits}f}"
    shown = f"**{text}**" if text == best else text
    if column.title == "s/step":
        low, high = spread(row["seconds"])
        shown += f" ({low:.{column.digits}f} to {high:.{column.digits}f})"
    return shown


def _title(column: Column) -> str:
    return f"{column.title} (quartiles)" if column.title == "s/step" else column.title


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
