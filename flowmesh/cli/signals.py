"""What a user, or who manages this process, asks of a command that is at work: to stop, and then to stop at once."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Iterator
from typing import Any

from flowmesh.errors import FlowMeshError


class Interrupted(FlowMeshError):
    """The user, or who manages this process, wants out."""

    def __init__(self, signal_number: int, what: str) -> None:
        super().__init__(what)
        self.exit_code = 128 + signal_number


class Signals:
    """SIGINT, SIGTERM and SIGHUP, counted and put into the queue of what happens."""

    def __init__(self, happened: queue.SimpleQueue[Any]) -> None:
        self.count = 0
        self.last: int = signal.SIGINT
        self._happened = happened

    @contextlib.contextmanager
    def handled(self) -> Iterator[Signals]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        self.count += 1
        self.last = number
        self._happened.put(None)  # a SimpleQueue may be put into from a signal handler

    def check(self) -> None:
        """Raise where one has come."""
        if self.count:
            raise Interrupted(self.last, "interrupted before the task began")
