"""Put tables and the figure of measured results into the documents.

    PYTHONPATH=. python benchmarks/systems/documents.py

A document says where a table goes by a pair of comments, ``<!-- begin systems -->`` and ``<!-- end systems -->``;
everything between them is replaced. Results that were not measured yet leave their place as it is.
"""

import argparse
import json
import sys
from pathlib import Path

from figure import plot
from sweep_tables import fastest_on_links, link_table, sweep_table
from tables import IN_SHORT, SUMMARY, Results, contender_table, memory_table, settings_note, summary_table

from benchmarks.blocks import fill
from deepspeed_sdp.cli import options
from deepspeed_sdp.errors import DataError, SDPError
from deepspeed_sdp.options import OptionParser

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of systems*.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    try:
        for path in write_documents(args.results, args.docs):
            print(path)
    except SDPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_documents(results: Path, docs: Path) -> list[Path]:
    """Fill ``benchmarks.md``, ``when.md`` and the README beside ``docs``, and draw ``systems.png``; the files written.

    Raises:
        DataError: results that are none, or none at all.
        OutputError: a document without the comments, or that cannot be written.
    """
    systems = _read(results / "systems.json")
    accelerator = _read(results / "systems_gpu.json")
    larger = _read(results / "systems_134m.json")
    sweeps = [found for name in ("sweep", "sweep_2", "sweep_8") if (found := _read(results / f"{name}.json"))]
    if systems is None and accelerator is None and not sweeps:
        raise DataError(f"--results: got {results} without systems.json or sweep.json; make bench-systems writes them")
    tables: dict[str, str] = {}
    written = []
    if systems is not None:
        picture = docs / "systems.png"
        options.written(picture, lambda path: plot(systems, path))
        written.append(picture)
        tables["systems"] = f"{settings_note(systems)}\n\n{contender_table(systems)}"
        tables["some systems"] = f"{settings_note(systems)}\n\n{contender_table(systems, SUMMARY)}"
        tables["when"] = summary_table(systems)
        tables["readme"] = summary_table(systems, IN_SHORT)
    if accelerator is not None:
        tables["systems on a GPU"] = f"{settings_note(accelerator)}\n\n{contender_table(accelerator)}"
    if larger is not None:
        tables["larger"] = f"{settings_note(larger)}\n\n{memory_table(larger)}"
    if sweeps:
        if swept := sweep_table(sweeps):
            tables["sweep"] = f"{settings_note(sweeps[0])}\n\n{swept}"
        for name, make in (("link", link_table), ("when on a link", fastest_on_links)):
            table = next(filter(None, map(make, sweeps)), "")
            if table:
                tables[name] = table
    places = {
        "../benchmarks/results/systems.md": ("systems", "sweep"),
        "benchmarks.md": ("some systems", "larger", "systems on a GPU", "link"),
        "when.md": ("when", "when on a link"),
        "../README.md": ("readme",),
    }
    for name, keys in places.items():
        fill(docs / name, {key: tables[key] for key in keys if key in tables})
        written.append(docs / name)
    return written


def _read(path: Path) -> Results | None:
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
    except ValueError:
        results = None
    if not isinstance(results, dict) or not results.get("settings") or not results.get("rows"):
        raise DataError(f"{path}: takes results of benchmarks/systems, with settings and rows")
    return results


if __name__ == "__main__":
    sys.exit(main())
