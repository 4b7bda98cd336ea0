"""docs/plans.md shows the tables as they are."""

import pytest

from benchmarks.plan_tables import TABLES
from tests.support.ranks import ROOT


@pytest.mark.parametrize("name", TABLES)
def test_docs_show_the_tables_as_they_are(name: str) -> None:
    shown = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
    assert TABLES[name]() in shown, f"python -m benchmarks.plan_tables {name}, and paste it into docs/plans.md"
