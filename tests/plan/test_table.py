"""The tables: what they promise, and that docs/plans.md shows them as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed_sdp.plan import make_design
from deepspeed_sdp.plan.mixing import spectral_gap_bound
from deepspeed_sdp.plan.table import design_table, gap_limit, main

DOCS = Path(__file__).parents[2] / "docs" / "plans.md"
# There are more pairs of workers than owner sets: two of them share nothing.
BELOW = {(12, 2), (13, 2), (14, 2), (15, 2), (16, 2)}


def test_designs_come_near_the_bound_up_to_sixteen_workers() -> None:
    rows = design_table()
    assert len(rows) == sum(n - 2 for n in range(3, 17))
    for row in rows:
        n, k = row.num_subnetworks, row.owners_per_unit
        assert row.owner_sets <= 64
        assert row.gap <= row.limit + 1e-9 <= row.bound + 2e-9
        assert (row.gap >= 0.98 * row.bound - 1e-9) == ((n, k) not in BELOW), row


def test_no_design_is_worse_than_windows() -> None:
    for n in [*range(3, 17), 20, 27, 33, 48, 61, 64]:
        for k in range(2, n, 1 if n < 17 else 9):
            best, windows = make_design("auto", n, k), make_design("cyclic", n, k)
            assert best.spectral_gap >= windows.spectral_gap - 1e-7, (n, k)


def test_limit_of_the_gap() -> None:
    assert gap_limit(12, 2, 66) == pytest.approx(6 / 11)
    assert gap_limit(12, 2, 64) == pytest.approx(0.5)
    assert gap_limit(7, 3, 7) == pytest.approx(7 / 9)
    assert gap_limit(7, 3, 6) == pytest.approx(2 / 3)
    assert gap_limit(8, 1, 64) == 0.0


@pytest.mark.parametrize(("n", "k"), sorted(BELOW))
def test_nothing_comes_near_the_bound_where_not_all_pairs_meet(n: int, k: int) -> None:
    assert gap_limit(n, k, 64) < 0.98 * spectral_gap_bound(n, k)
    reached = make_design("auto", n, k).spectral_gap
    if n % 2 == 0:
        assert reached == pytest.approx(gap_limit(n, k, 64), abs=1e-9)


@pytest.mark.parametrize("name", ["designs", "few", "balance", "capacity"])
def test_docs_show_the_tables_as_they_are(name: str) -> None:
    assert main([name]) in DOCS.read_text(), f"python -m deepspeed_sdp.plan.table {name}, and paste it into {DOCS}"


def test_table_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed_sdp.plan.table", "capacity"], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip("\n") in DOCS.read_text()
    with pytest.raises(SystemExit, match="got 'x', takes one of designs, few, balance, capacity"):
        main(["x"])
