"""The logs of one task inside the view, followed."""

from __future__ import annotations

import functools
from collections import deque
from pathlib import Path

from rich.text import Text

from flowmesh.cli.control_types import LogsPlace
from flowmesh.cli.top import cells
from flowmesh.errors import FlowMeshError
from flowmesh.files.log_files import LogFiles, Tail
from flowmesh.messages.text import harmless
from flowmesh.redaction import Redactor

KEPT_LINES = 2000
FIRST_LINES = 200
"""Of each file, where the pane begins."""


class LogPane:
    """
    Raises:
        FlowMeshError: the logs cannot be read.
    """

    def __init__(self, task_id: str, place: LogsPlace) -> None:
        self.task_id = task_id
        self._logs = LogFiles(Path(place.logs_dir))
        self._redact = Redactor((bytes.fromhex(each).decode(errors="replace") for each in place.secrets), prose=True)
        self._tails: dict[str, Tail] = {}
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._up = 0
        """Lines that it was scrolled up by; 0: it follows."""
        self._trouble = ""
        self.poll()

    def poll(self) -> None:
        """Take in what was written meanwhile: of each file one block at most, so that the keys stay quick."""
        try:
            for name in self._logs.names(None):
                if name not in self._tails:
                    opened = functools.partial(self._logs.open, name)
                    self._tails[name] = Tail(opened, name.removesuffix(".log"), FIRST_LINES)
            written = [tail for tail in self._tails.values() if not tail.is_empty]
            for tail in written:
                prefix = f"{tail.label} | " if len(written) > 1 else ""
                for line in tail.lines(at_end=True)[-KEPT_LINES:]:
                    shown = harmless(line, self._redact).decode(errors="replace").expandtabs(4)
                    new = [prefix + part for part in shown.splitlines() or [""]]
                    self._lines.extend(new)
                    self._up = min(len(self._lines), self._up + len(new)) if self._up else 0
            self._trouble = ""
        except FlowMeshError as error:
            self._trouble = str(error)

    def scroll(self, lines: int) -> None:
        """Up by so many lines; negative: down."""
        self._up = max(0, min(len(self._lines) - 1, self._up + lines))

    def lines(self, width: int, height: int) -> list[Text]:
        """Headline and the last lines, or those where it was scrolled to."""
        state = self._trouble or ("" if self._up == 0 else f"{self._up} lines below")
        head = Text.assemble("logs of ", cells.cell(self.task_id), style="bold")
        if state:
            head.append_text(cells.cell(f"  {state}", "red" if self._trouble else "yellow"))
        end = len(self._lines) - self._up
        shown = list(self._lines)[max(0, end - (height - 1)) : end]
        if not self._lines and not self._trouble:
            shown = ["(it has written nothing yet)"]
        return [cells.fitted(line, width) for line in (head, *map(Text, shown))]
