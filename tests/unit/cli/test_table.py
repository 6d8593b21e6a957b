"""Tables with characters that take two cells of a terminal, or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from flowmesh.cli import render
from flowmesh.cli.render import Column

COLUMNS = (Column("TAGS", least=4), Column("STATUS"))


@pytest.mark.parametrize("tags", ["模型训练", "e\u0301te\u0301", "plain"])
def test_the_next_column_starts_at_the_same_cell(tags: str) -> None:
    header, row, other = render.table_lines(COLUMNS, [[tags, "IDLE"], ["-", "IDLE"]])
    starts = {cell_len(line[: line.index(word)]) for line, word in ((header, "STATUS"), (row, "IDLE"), (other, "IDLE"))}
    assert len(starts) == 1


def test_a_wide_cell_is_cut_to_its_width() -> None:
    header, row = render.table_lines(COLUMNS, [["模型训练集", "IDLE"]], width=16)
    assert row == "模型训…   IDLE"
    assert (cell_len(header), cell_len(row)) == (16, 14)


@given(st.lists(st.text("ab模\u0301 ", max_size=12), min_size=1, max_size=4), st.integers(20, 60))
def test_no_line_is_wider_than_the_terminal(texts: list[str], width: int) -> None:
    for line in render.table_lines(COLUMNS, [[text, "IDLE"] for text in texts], width=width):
        assert cell_len(line) <= width


@pytest.mark.parametrize(("number", "text"), [(0, "0 tasks"), (1, "1 task"), (2, "2 tasks")])
def test_counts(number: int, text: str) -> None:
    assert render.count(number, "task") == text
