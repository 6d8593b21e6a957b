"""The live view: what the keys do, and what is on the screen."""

from __future__ import annotations

import time

from rich.text import Text

from flowmesh.cli import render
from flowmesh.cli.top import cells, frame
from flowmesh.cli.top.feed import Feed, Source
from flowmesh.cli.top.frame import Sort
from flowmesh.cli.top.log_pane import LogPane
from flowmesh.cli.top.painter import Painter
from flowmesh.cli.top.picture import Picture
from flowmesh.cli.top.terminal import Terminal
from flowmesh.errors import EXIT_BY_SIGNAL, EXIT_OK, FlowMeshError, UnavailableError

TICK_S = 1.0
"""The screen is drawn at least this often: ages go on, and a log pane reads."""
LATE_S = 3.0
"""A picture that is older than this, beyond the time between two, is marked as old."""
NOTE_S = 5.0
_PAGE = 10
_HELP = (
    ("↑ ↓ or k j", "select a task"),
    ("c", "cancel the selected task; asks first"),
    ("l", "follow its logs; ↑ ↓ and page keys scroll, l or q closes them"),
    ("s", "sort by slot, time, progress, energy, cost or name"),
    ("?", "this help"),
    ("q", "quit"),
)


class App:
    """
    Args:
        every_s: between two pictures.
    """

    def __init__(
        self, source: Source, feed: Feed, terminal: Terminal, painter: Painter, *, sort: Sort, every_s: float
    ) -> None:
        self._source = source
        self._feed = feed
        self._terminal = terminal
        self._painter = painter
        self._sort = sort
        self._late_s = every_s + LATE_S
        self._began = time.monotonic()
        self._selected: str | None = None
        self._asked: str | None = None
        """The task that a `y` cancels."""
        self._pane: LogPane | None = None
        self._help = False
        self._note = ""
        self._note_until = 0.0
        self._ended = False

    def run(self) -> int:
        """Until a key or a signal ends it; returns the exit code.

        Raises:
            FlowMeshError: what no waiting mends, such as a node of another user.
        """
        while not self._ended and self._terminal.stopped_by is None:
            if self._feed.error is not None and not isinstance(self._feed.error, UnavailableError):
                self._say(str(self._feed.error))
            if self._feed.fatal is not None:
                raise self._feed.fatal
            self._draw()
            for key in self._terminal.wait(TICK_S):
                self._press(key)
        return EXIT_OK if self._terminal.stopped_by is None else EXIT_BY_SIGNAL + self._terminal.stopped_by

    def _press(self, key: str) -> None:
        self._note = ""
        if self._asked is not None:
            if key in ("y", "Y"):
                self._feed.cancel(self._asked)
                self._say(f"cancelling {self._asked} …")
            else:
                self._say("not cancelled")
            self._asked = None
        elif self._pane is not None:
            self._press_in_pane(self._pane, key)
        elif self._help:
            self._help = False
        else:
            self._press_in_list(key)

    def _press_in_pane(self, pane: LogPane, key: str) -> None:
        match key:
            case "q" | "l" | "escape":
                self._pane = None
            case "up" | "k":
                pane.scroll(1)
            case "down" | "j":
                pane.scroll(-1)
            case "page-up":
                pane.scroll(_PAGE)
            case "page-down" | " ":
                pane.scroll(-_PAGE)
            case "c":
                self._asked = pane.task_id

    def _press_in_list(self, key: str) -> None:
        match key:
            case "q":
                self._ended = True
            case "?" | "h":
                self._help = True
            case "s":
                self._sort = self._sort.next()
            case "up" | "k":
                self._select(-1)
            case "down" | "j":
                self._select(1)
            case "c" if self._selected is not None:
                self._asked = self._selected
            case "l" | "enter" if self._selected is not None:
                self._open_logs(self._selected)
            case "c" | "l" | "enter":
                self._say("no task is selected: ↓ selects one")

    def _open_logs(self, task_id: str) -> None:
        try:
            self._pane = LogPane(task_id, self._source.logs(task_id))
        except FlowMeshError as error:
            self._say(str(error))

    def _picture(self) -> Picture | None:
        picture = self._feed.picture
        return None if picture is None else frame.ordered(picture, self._sort)

    def _select(self, step: int) -> None:
        picture = self._picture()
        ids = [task.task_id for task in picture.selectable] if picture is not None else []
        if not ids:
            self._say("there is no task to select")
        elif self._selected in ids:
            self._selected = ids[max(0, min(len(ids) - 1, ids.index(self._selected) + step))]
        else:
            self._selected = ids[0 if step > 0 else -1]

    def _say(self, text: str) -> None:
        self._note, self._note_until = text, time.monotonic() + NOTE_S

    def _draw(self) -> None:
        if (said := self._feed.said) is not None:
            self._feed.said = None
            self._say(said)
        width, height = self._terminal.size()
        room = max(1, height - 1)
        if self._pane is not None:
            self._pane.poll()
            lines = self._pane.lines(width, room)
        elif self._help:
            lines = [Text("flowmesh top", style="bold"), *(Text(f"  {key:<12}{what}") for key, what in _HELP)]
        else:
            lines = self._overview(width, room)
        lines = lines[:room] + [Text("")] * (room - len(lines))
        self._painter.draw(self._terminal, [*lines, self._footer(width)], width)

    def _overview(self, width: int, height: int) -> list[Text]:
        picture = self._picture()
        lines = self._trouble(width)
        if picture is None or (picture.of == "node" and self._feed.error is not None):
            return lines or [Text("asking …", style="bright_black")]
        if self._selected not in [task.task_id for task in picture.selectable]:
            self._selected = None
        lines = [*frame.header(picture, width), *lines]
        return lines + frame.body(picture, width, height - len(lines), self._selected)

    def _trouble(self, width: int) -> list[Text]:
        """Why there is no picture, or only an old one."""
        error, age_s = self._feed.error, time.monotonic() - (self._feed.taken_at or self._began)
        if error is None:
            if age_s < self._late_s:
                return []
            text = f"no answer for {render.seconds(age_s)}"
        elif self._feed.picture is None or self._feed.picture.of == "node":
            text = f"{error}; waiting for it"
        else:
            text = f"{error}; trying again. What is below is {render.seconds(age_s)} old"
        wrapped = cells.cell(text, "bold red").wrap(self._painter.console, max(1, width))
        return list(wrapped)

    def _footer(self, width: int) -> Text:
        if self._asked is not None:
            line = Text.assemble("cancel ", cells.cell(self._asked), "? y/n", style="bold yellow")
            if line.cell_len > width:
                line = Text(f"cancel {cells.middle(self._asked, max(5, width - 14))}? y/n", style="bold yellow")
            return line
        if self._note and time.monotonic() < self._note_until:
            return cells.fitted(cells.cell(self._note, "yellow"), width)
        if not self._terminal.has_keys:
            return cells.fitted(
                Text("no keys: standard input is no terminal. Ctrl-C ends", style="bright_black"), width
            )
        if self._pane is not None:
            keys = "↑↓ scroll  c cancel  q back"
        elif self._help:
            keys = "any key: back"
        else:
            keys = f"↑↓ select  c cancel  l logs  s sort: {self._sort.value}  ? help  q quit"
        return cells.fitted(Text(keys, style="reverse"), width)
