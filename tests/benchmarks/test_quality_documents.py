"""Pictures, tables and sentences of quality: all of them from the rows in benchmarks/results."""

import copy
import re

import pytest

from benchmarks.blocks import fill
from benchmarks.quality import claims
from benchmarks.quality.documents import SIZES, documents, read_rows
from benchmarks.quality.figures import changes, series
from benchmarks.quality.methods import CURVES, ROWS
from benchmarks.quality.run import read_results
from benchmarks.quality.tables import Results, main_table, options_table
from deepspeed_sdp.errors import DataError
from tests.support.ranks import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def trained():
    return read_results(RESULTS / "quality.jsonl")


@pytest.mark.parametrize("size", SIZES)
def test_points_of_a_picture_are_the_rows_of_its_table(size):
    rows = read_rows(RESULTS, size)
    table = {}
    for line in main_table(rows).splitlines()[2:]:
        name, flops, loss, _, _, at_equal_tokens, *_ = (cell.strip() for cell in line.strip("|").split(" | "))
        table[name] = {"flops": flops, "equal_flops": loss.split()[0], "equal_tokens": at_equal_tokens.split(" ")[0]}
    shown = [(one.equal, point) for one in series(rows) for point in one.points]
    assert {point.name for equal, point in shown if equal == "equal_flops"} == set(table)
    assert len({(equal, point.name) for equal, point in shown}) == len(shown), "no row twice"
    for equal, point in shown:
        assert (f"{point.flops:.3f}", f"{point.loss:.3f}") == (table[point.name]["flops"], table[point.name][equal])


def test_a_row_that_begins_like_another_is_not_taken_for_it():
    """Two variants of the plain method stood as its points."""
    rows = read_rows(RESULTS, "small")
    by_name = {row["name"]: row for row in rows}
    curve = next(
        one for one in series(rows) if one.label == "forward masking of neurons" and one.equal == "equal_flops"
    )
    assert [point.loss for point in curve.points] == [
        by_name[f"forward, neurons, {coverage}"]["equal_flops"][0] for coverage in ("1/4", "1/2", "3/4")
    ]
    assert {name for names in CURVES.values() for name in names} <= set(ROWS)
    shown = {name: change for name, change, _ in changes(rows)}
    lines = options_table(rows, "forward, neurons, 1/2").splitlines()[2:]
    table = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[4] for line in lines}
    assert {ROWS[name].variant for name in shown} | {"as it is"} == set(table)
    for name, change in shown.items():
        assert table[ROWS[name].variant].startswith(f"{change:+.3f}")


@pytest.mark.parametrize("size", SIZES)
def test_summaries_are_those_of_the_trainings(trained, size):
    results = Results(trained, size)
    for row in read_rows(RESULTS, size):
        losses = results.losses(row["name"], "flops")
        assert (row["seeds"], row["equal_flops"][0]) == (len(losses), pytest.approx(sum(losses.values()) / len(losses)))


@pytest.mark.parametrize("name", ["quality.md", "when.md", "../README.md", "../benchmarks/results/quality.md"])
def test_the_documents_hold_what_the_results_say(tmp_path, name):
    copied = tmp_path / "document.md"
    copied.write_text((ROOT / "docs" / name).read_text())
    fill(copied, documents(RESULTS)[name])
    assert copied.read_text() == (ROOT / "docs" / name).read_text(), "make docs-quality brings them up to date"


def test_no_loss_and_no_count_of_seeds_stands_outside_of_what_is_made():
    prose = re.sub(
        r"<!-- begin (.+?) -->.*?<!-- end \1 -->", "", (ROOT / "docs" / "quality.md").read_text(), flags=re.S
    )
    when = (ROOT / "docs" / "when.md").read_text()
    prose += re.sub(
        r"<!-- begin (.+?) -->.*?<!-- end \1 -->", "", when[when.index("## What is given up") :], flags=re.S
    )
    assert re.findall(r"\b[23]\.\d{2,3}\b|[+-]0\.\d+|\b(?:one|two|\d) seeds?\b|behind by", prose) == []


def test_a_sentence_that_the_results_no_longer_bear_out_is_refused(trained):
    changed = copy.deepcopy(trained)
    for row in changed:
        if row["name"] == claims.SMALL_DENSE:
            row["loss_calibrated"] += 1.0
    with pytest.raises(DataError, match="do not bear out 'the smaller dense model ahead"):
        claims.in_short({size: Results(changed, size) for size in SIZES})
