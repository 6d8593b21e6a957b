"""The page of the measurements, of which a run replaces parts and nothing else."""

from __future__ import annotations

import pytest

from tests.bench.document import HEADINGS, part, replaced
from tests.bench.measure import Row
from tests.kit.paths import ROOT

PAGE = """# Benchmarks

About it.

## Echo

<!-- bench echo -->
old
<!-- end of echo -->

A note by hand.

## FAISS

<!-- bench rag -->
theirs
<!-- end of rag -->
"""


def test_a_run_replaces_its_own_part_alone() -> None:
    assert replaced(PAGE, "echo", "new") == PAGE.replace("old", "new")


def test_a_new_part_stands_where_its_kind_belongs() -> None:
    page = replaced(PAGE, "training", "t")
    assert page.index("A note by hand.") < page.index("## Training") < page.index("## FAISS")
    assert page.replace("## Training\n\n<!-- bench training -->\nt\n<!-- end of training -->\n\n", "") == PAGE
    last = replaced(PAGE, "delivery", "d")
    assert last == PAGE + "\n## Delivery\n\n<!-- bench delivery -->\nd\n<!-- end of delivery -->\n"


def test_a_part_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="echo"):
        replaced(PAGE.replace("<!-- end of echo -->", ""), "echo", "new")


def test_a_table_keeps_its_columns_whatever_a_cell_contains() -> None:
    text = part("today", [Row("`tar | pigz`", "1 s", "2 ×", "fast")])
    assert text.splitlines()[-1] == "| `tar \\| pigz` | 1 s | 2 × | fast |"


def test_each_part_of_the_page_is_one_that_can_be_measured_again() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    names = [line.split()[2] for line in page.splitlines() if line.startswith("<!-- bench ")]
    assert names == [name for name in HEADINGS if name in names]
    for name in names:
        assert replaced(page, name, "x") != page
        assert (ROOT / "tests" / "bench" / f"{name}.py").is_file()
