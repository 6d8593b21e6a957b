"""Turns lines of styled text into what a stream can show: colours, characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from flowmesh.cli import chart
from flowmesh.cli.top import cells


class Screen(Protocol):
    def draw(self, lines: list[str]) -> None:
        """Show these lines in place of what is shown."""


class Painter:
    """Colours follow the terminal, NO_COLOR and TERM; without UTF-8, bars and marks are plain characters."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False)
        self._stream = stream
        self._encoding = (stream.encoding or "utf-8").lower()

    def line(self, text: Text) -> str:
        """One line, with the codes for its colours."""
        with self.console.capture() as captured:
            self.console.print(text, end="", soft_wrap=True)
        line = captured.get()
        if self._encoding.replace("-", "") != "utf8":
            line = line.translate(chart.ASCII).encode(self._encoding, "replace").decode(self._encoding)
        return line

    def draw(self, screen: Screen, lines: Sequence[Text], width: int) -> None:
        screen.draw([self.line(cells.fitted(line, width)) for line in lines])

    def print(self, lines: Sequence[Text]) -> None:
        """Write the lines to the stream, once."""
        for line in lines:
            print(self.line(line).rstrip(), file=self._stream)
