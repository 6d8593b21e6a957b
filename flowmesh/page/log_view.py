"""The end of a task's log, as `flowmesh logs` shows it: secrets hidden, control characters escaped."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from flowmesh.cli.control import Control
from flowmesh.files.log_files import LogFiles, Tail
from flowmesh.messages.text import harmless
from flowmesh.page.sources import Cached
from flowmesh.redaction import Redactor

LINES = 300
"""Of each file."""
MOST_LINE_BYTES = 8192
MOST_FILES = 16
KNOWN_TASKS = 32


class LogView:
    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._known: OrderedDict[str, Cached[str]] = OrderedDict()

    def text(self, task_id: str) -> str:
        """
        Raises:
            FlowMeshError: the node does not answer (only it knows the secrets), or the log cannot be read.
        """
        known = self._known.setdefault(task_id, Cached(lambda: self._read(task_id)))
        while len(self._known) > KNOWN_TASKS:
            self._known.popitem(last=False)
        return known()

    def _read(self, task_id: str) -> str:
        with Control(self._state_dir) as control:
            place = control.logs(task_id)
        hide = Redactor((bytes.fromhex(each).decode(errors="replace") for each in place.secrets), prose=True)
        logs = LogFiles(Path(place.logs_dir))
        shown: list[str] = []
        names = logs.names(None)[:MOST_FILES]
        for name in names:
            tail = Tail(lambda name=name: logs.open(name), name, LINES)  # type: ignore[misc]
            lines: list[bytes] = []
            while part := tail.lines(at_end=True):
                lines = (lines + part)[-LINES:]
            if lines and len(names) > 1:
                shown.append(f"── {name}")
            shown += [harmless(each[:MOST_LINE_BYTES], hide).decode() for each in lines]
        return "\n".join(shown)
