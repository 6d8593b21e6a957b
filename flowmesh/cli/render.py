"""Formats the output of commands: tables fitted to a terminal or in full width otherwise, and short forms of values."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TextIO

from flowmesh.messages.text import escaped_json

PLAIN_WIDTH = 120
"""Columns where the output is not a terminal."""

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def width(stream: TextIO) -> int:
    """The number of columns for a line."""
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if is_terminal(stream) else PLAIN_WIDTH


def print_json(value: Any) -> None:
    print(escaped_json(json.dumps(value, ensure_ascii=False)))


def printable(text: str) -> str:
    """`text` without escape sequences and control characters, which would change a terminal's state."""
    plain = _ESCAPE.sub("", text)
    return "".join(char if unicodedata.category(char)[0] != "C" else " " for char in plain)


def shorten(value: Any, room: int) -> str:
    """`value` on one line of at most `room` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(printable(text[: room * 8]).split())
    return text if len(text) <= room else f"{text[: max(0, room - 1)]}…"


def seconds(value: float) -> str:
    """A duration with two digits and a unit: 0.35 s, 4.2 s, 48 s, 12 min, 3.5 h, 4 d."""
    if value < 1:
        return f"{value:.2f} s"
    for limit, unit, size in ((60, "s", 1), (3600, "min", 60), (48 * 3600, "h", 3600)):
        if value < limit:
            return f"{value / size:.1f} {unit}" if value / size < 9.95 else f"{value / size:.0f} {unit}"
    return f"{value / 86400:.0f} d"


def gib(size: float) -> str:
    """A size in GiB, short: 0.5G, 80G."""
    return f"{size / 2**30:.0f}G" if size >= 10 * 2**30 else f"{size / 2**30:.1f}G"


def succeeded(runtime_s: Any) -> str:
    """The outcome of a task that succeeded, with its runtime if that is known."""
    return f"succeeded in {seconds(runtime_s)}" if isinstance(runtime_s, int | float) else "succeeded"


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 task, 2 tasks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Column(NamedTuple):
    """A column, and how it may shrink on a terminal that is too narrow for the table."""

    header: str
    least: int | None = None
    """It may be cut to this width; None: it is never cut."""
    drop: int = 0
    """The column with the highest number is left out first; 0: never."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, stream: TextIO | None = None) -> None:
    """Print rows below their headers: fitted to a terminal, else in full width."""
    out = stream or sys.stdout
    if not is_terminal(out):
        print("\n".join(table_lines(columns, rows)), file=out)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, highlight=False)
    header, *lines = table_lines(columns, rows, width=width(out))
    console.print(Text(header, style="bold"), no_wrap=True, overflow="crop")
    for line in lines:
        text = Text(line)
        for pattern, style in _STYLES.items():
            text.highlight_regex(rf"(?:^|  ){pattern}", style)
        console.print(text, no_wrap=True, overflow="crop")


_STYLES = {
    r"IDLE(?= |$)": "green",
    r"(?:RUNNING|running)(?= |$)": "cyan",
    r"(?:STARTING|DRAINING)(?= |$)": "yellow",
    r"(?:DEGRADED|stale \(\S+\))": "red",
}


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, width: int | None = None) -> list[str]:
    """The table as plain text, one line per row, fitted to `width` as far as cutting and dropping columns allows.

    An empty cell is `-`, so that scripts can split lines into columns.
    """
    from rich.cells import cell_len

    cells = [[column.header for column in columns], *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = {index: max(cell_len(row[index]) for row in cells) for index in range(len(columns))}
    if width is not None:
        widths = fit(columns, widths, width)
    return ["  ".join(_sized(row[index], size) for index, size in widths.items()).rstrip() for row in cells]


def fit(columns: Sequence[Column], widths: dict[int, int], room: int) -> dict[int, int]:
    """The widths of the columns that are shown: drops what may be dropped, then cuts the widest, until all fit.

    rich's own fitting cuts off the last columns instead: it knows no order of dropping.
    """
    least = {index: min(size, columns[index].least or size) for index, size in widths.items()}
    kept = dict(widths)
    while _total(least[index] for index in kept) > room:
        droppable = [index for index in kept if columns[index].drop]
        if not droppable:
            return {index: least[index] for index in kept}
        del kept[max(droppable, key=lambda index: columns[index].drop)]
    while _total(kept.values()) > room:
        widest = max(kept, key=lambda index: kept[index] - least[index])
        kept[widest] -= 1
    return kept


def _total(widths: Iterable[int]) -> int:
    sizes = list(widths)
    return sum(sizes) + 2 * (len(sizes) - 1)


def _sized(text: str, size: int) -> str:
    """`text` padded or cut to `size` terminal cells; East Asian characters take two."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) > size:
        text = f"{set_cell_size(text, size - 1).rstrip()}…"
    return set_cell_size(text, size)


def warnings(lines: object) -> None:
    """Print a task's warnings, one a line."""
    for line in lines if isinstance(lines, list) else []:
        print(f"warning: {printable(str(line))}")
