"""Rows of a group beside those they vary, paired by seed, as a table between comments of a page.

python -m benchmarks.quality.pairs --groups schedules --page benchmarks/results/schedules.md
"""

import argparse
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import GROUPS, ROWS, SIZES
from benchmarks.quality.run import read_results

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    parser.add_argument("--page", type=Path, help="default: the tables are printed")
    args = parser.parse_args()
    results = [row for row in read_results(args.results) if row["equal"] == "flops"]
    for group in args.groups:
        table = table_of(results, group)
        if group == "local":
            table += "\n\nAt the same bytes, beside averaging gradients in every step for so many fewer steps:\n\n"
            table += at_equal_bytes(results)
        print(table)
        if args.page is not None:
            put(args.page, group, table)


def table_of(results: list[Result], group: str) -> str:
    """Mean and standard error of the differences, in nats per token."""
    lines = ["| size | row | beside | learning rate | seeds | loss | difference |", "| --- " * 7 + "|"]
    for size in SIZES:
        found: dict[tuple[str, float], dict[int, Result]] = defaultdict(dict)
        for row in results:
            if row["size"] == asdict(SIZES[size]):
                found[row["name"], row["lr"]][row["seed"]] = row
        for (name, lr), mine in found.items():
            parent = ROWS[name].like if name in ROWS and ROWS[name].group == group else ""
            if not parent:
                continue
            # Its own best rate: what is compared is what one would run.
            rates = [rate for other, rate in found if other == parent and 0 in found[parent, rate]]
            best = min(rates, key=lambda rate: found[parent, rate][0]["loss_calibrated"], default=None)
            pairs = [(mine[s], found[parent, best][s]) for s in mine if best is not None and s in found[parent, best]]
            if not pairs:
                continue
            differences = [one["loss_calibrated"] - other["loss_calibrated"] for one, other in pairs]
            loss = statistics.mean(one["loss_calibrated"] for one, _ in pairs)
            error = f" ± {statistics.stdev(differences) / len(pairs) ** 0.5:.3f}" if len(pairs) > 1 else ""
            said = ROWS[name].variant
            lines.append(
                f"| {size} | {said} | {parent} | {lr:g} | {len(pairs)} | {loss:.3f} | "
                f"{statistics.mean(differences):+.3f}{error} |"
            )
    return "\n".join(lines)


def at_equal_bytes(results: list[Result]) -> str:
    """Local steps beside a training of every step that ends when as many bytes are sent."""
    lines = ["| row | interval | local steps | every step, fewer of them |", "| --- " * 4 + "|"]
    for name in dict.fromkeys(row.like for row in ROWS.values() if row.group == "local"):
        for interval, fewer in ((10, "tenth"), (50, "fiftieth")):
            local = _best(results, f"{name}; {interval} local steps", "small")
            every = _best(results, str(name), fewer)
            lines.append(f"| {name} | {interval} | {local} | {every} |")
    return "\n".join(lines)


def _best(results: list[Result], name: str, size: str) -> str:
    """Mean loss at the learning rate with the lowest one of those with most seeds."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in results:
        if row["name"] == name and row["size"] == asdict(SIZES[size]):
            found[row["lr"]].append(row["loss_calibrated"])
    most = max(map(len, found.values()), default=0)
    means = [statistics.mean(losses) for losses in found.values() if len(losses) == most]
    return f"{min(means):.3f} ({most} seeds)" if means else ""


def put(page: Path, group: str, table: str) -> None:
    """Between the page's comments of this group."""
    begin, end = f"<!-- begin {group} -->", f"<!-- end {group} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
