"""What is imported is declared, and the lowest versions that are declared are those that are tested."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("deepspeed_sdp", "launch", "examples", "benchmarks")


def imported() -> dict[str, Path]:
    """Top-level names of what the code imports, each with a file that does."""
    names: dict[str, Path] = {}
    for file in (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            else:
                continue
            names.update((module.partition(".")[0], file) for module in modules)
    return names


def minima(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([A-Za-z0-9_-]+)(?:>=([0-9.]+))?", requirement) for requirement in requirements)
    return {match[1].replace("-", "_"): match[2] for match in found if match and match[2]}


def test_what_is_imported_is_declared() -> None:
    # Scripts of one folder import each other by their bare names.
    ours = {path.stem for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {*FOLDERS, "tests"}
    foreign = {name: file for name, file in imported().items() if name not in sys.stdlib_module_names | ours}
    undeclared = {name: str(file) for name, file in foreign.items() if name not in minima(PROJECT["dependencies"])}
    assert not undeclared


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    lines = [line for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {name.replace("-", "_"): version for name, version in (line.split("==") for line in lines)}
    declared = minima(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    for name, lowest in declared.items():
        if name in ("torch", "ruff", "mypy"):  # an old torch has no small wheels, and tools of the style run no tests
            continue
        parts = lowest.split(".")
        assert pinned[name].split(".")[: len(parts)] == parts, name
