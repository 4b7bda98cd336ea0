"""Put tables and sentences of measured quality into the documents, and draw their pictures.

    python -m benchmarks.quality.documents

A document says where a block goes by a pair of comments, ``<!-- begin long -->`` and ``<!-- end long -->``. Reads
``quality.jsonl`` and the summaries that ``benchmarks.quality.tables --summary`` wrote.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.blocks import fill
from benchmarks.quality import claims
from benchmarks.quality.figures import plot
from benchmarks.quality.run import read_results
from benchmarks.quality.tables import Results, main_table, options_table, parents
from deepspeed_sdp.cli.options import written

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("small", "long", "narrow", "deep", "wide")
PICTURES = {"small": "quality.png", "long": "quality_long.png"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of quality*.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    for document, blocks in documents(args.results).items():
        fill(args.docs / document, blocks)
    for size, name in PICTURES.items():
        rows = read_rows(args.results, size)
        written(args.docs / name, lambda path, rows=rows: plot(rows, path))


def documents(results: Path) -> dict[str, dict[str, str]]:
    """Document -> block -> markdown.

    Raises:
        DataError: the results do not bear out a sentence any more.
    """
    trained = read_results(results / "quality.jsonl")
    sizes = {size: Results(trained, size) for size in SIZES}
    tables = {}
    for size, of_size in sizes.items():
        rows = read_rows(results, size)
        tables[size] = f"{main_table(rows)}\n\n{of_size.tuning()}"
        if varied := parents(rows):
            tables[f"options {size}"] = "\n\n".join(options_table(rows, parent) for parent in varied)
    return {
        "../benchmarks/results/quality.md": tables,
        "quality.md": {
            "in short": claims.in_short(sizes),
            "long": main_table(read_rows(results, "long")),
            "notes on options": claims.options(sizes),
        },
        "when.md": {"when quality": claims.given_up(sizes)},
        "../README.md": {"readme quality": claims.in_readme(sizes)},
    }


def read_rows(results: Path, size: str) -> list[dict[str, Any]]:
    """The rows of a summary as :meth:`Results.summary` gives them."""
    name = "quality.json" if size == "small" else f"quality_{size}.json"
    rows: list[dict[str, Any]] = json.loads((results / name).read_text(encoding="utf-8"))["rows"]
    for row in rows:
        for key, value in row.items():
            if isinstance(value, list) and len(value) == 2 and value[1] is None:
                row[key] = [value[0], math.nan]
    return rows


if __name__ == "__main__":
    main()
