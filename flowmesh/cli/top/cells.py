"""Cells and tables of styled text, fitted to a width. Every text from outside is made harmless here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from flowmesh.cli import chart, render
from flowmesh.cli.render import Column

STATUS_STYLES = {
    "IDLE": "green",
    "RUNNING": "cyan",
    "STARTING": "yellow",
    "DRAINING": "yellow",
    "DEGRADED": "bold red",
    "stale": "red",
    "ready": "green",
    "starting": "yellow",
    "retiring": "yellow",
}
VERDICT_STYLES = {"ok": "green", "cancelled": "yellow", "drained": "yellow"}
UNKNOWN = "-"
Cell = Text | str


def cell(text: str, style: str = "") -> Text:
    """A text from outside, on one line and without control characters. rich's markup is not read in it."""
    return Text(" ".join(render.printable(text).split()), style=style)


def status(word: str) -> Text:
    """A status, coloured by its first word."""
    return cell(word, STATUS_STYLES.get(word.partition(" ")[0], ""))


def meter(share: float | None, width: int, *, warn: float = 2.0) -> Text:
    """A bar.

    Args:
        share: 0 to 1; None: not known.
        warn: from this share on it is red.
    """
    style = "red" if share is not None and share >= warn else "green"
    text = chart.bar(share, width)
    filled = len(text.rstrip(chart.EMPTY))
    return Text.assemble((text[:filled], style), (text[filled:], "bright_black"))


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{min(9.99, max(0.0, share)) * 100:.0f}%"


def middle(text: str, width: int) -> str:
    """`text` in at most `width` cells, cut in the middle: ids often differ in their last characters only."""
    if cell_len(text) <= width or width < 5:
        return text if cell_len(text) <= width else set_cell_size(text, width)
    tail = text
    while cell_len(tail) > (width - 1) // 2:
        tail = tail[1:]
    return f"{set_cell_size(text, width - 1 - cell_len(tail))}…{tail}"


def grid(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int, *, ids: Sequence[str] = ("TASK", "WORKER")
) -> list[Text]:
    """Headers and rows, each exactly fitted: columns are dropped and cut as their `Column` says.

    Args:
        ids: headers of columns that are cut in the middle.
    """
    texts = [[each if isinstance(each, Text) else cell(each) for each in row] for row in rows]
    widths = {
        number: max([cell_len(column.header), *(row[number].cell_len for row in texts)])
        for number, column in enumerate(columns)
    }
    widths = render.fit(columns, widths, width)
    head = Text("  ").join([_sized(Text(columns[number].header), size) for number, size in widths.items()])
    head.stylize("bright_black")
    lines = [head]
    for row in texts:
        cells = []
        for number, size in widths.items():
            text = row[number]
            if columns[number].header in ids and text.cell_len > size:
                text = Text(middle(text.plain, size), style=text.style)
            cells.append(_sized(text, size))
        lines.append(Text("  ").join(cells))
    return [fitted(line, width) for line in lines]


def _sized(text: Text, size: int) -> Text:
    text = text.copy()
    text.truncate(size, overflow="ellipsis", pad=True)
    return text


def fitted(line: Text, width: int) -> Text:
    """A line of at most `width` cells."""
    line = line.copy()
    line.rstrip()
    line.truncate(width, overflow="ellipsis")
    return line


def flow(items: Sequence[Text], width: int) -> list[Text]:
    """Items side by side, on as many lines as they need."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 3 + item.cell_len <= width:
            lines[-1].append("   ").append_text(item)
        else:
            lines.append(Text(" ").append_text(item))
    return [fitted(line, width) for line in lines]
