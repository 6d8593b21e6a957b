"""Signals that ask a running command to stop. They are counted, so that a second one can mean "at once"."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Collection, Iterator
from typing import Any

from flowmesh.errors import EXIT_BY_SIGNAL, FlowMeshError


class Interrupted(FlowMeshError):
    """A signal asked this command to stop. Its exit code is that of a process ended by the signal."""

    def __init__(self, signal_number: int, what: str) -> None:
        super().__init__(what)
        self.exit_code = EXIT_BY_SIGNAL + signal_number


@contextlib.contextmanager
def continuing(task_ids: Collection[str]) -> Iterator[None]:
    """A wait for tasks of a deployment, which Ctrl-C ends: its error says that they continue, and what to do then.

    Args:
        task_ids: those that have not ended when Ctrl-C comes; none: nothing is said.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not task_ids:
            raise
        one = next(iter(task_ids)) if len(task_ids) == 1 else ""
        what = f"{one} continues" if one else f"the {len(task_ids)} tasks continue"
        how = f"`flowmesh wait {one or 'TASK…'}` waits again, `flowmesh cancel {one or 'TASK'}` ends it"
        raise Interrupted(signal.SIGINT, f"interrupted; {what}: {how}") from None


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP, and wakes whoever waits on the queue."""

    def __init__(self, happened: queue.SimpleQueue[Any]) -> None:
        self.count = 0
        self.last: int = signal.SIGINT
        self._happened = happened

    @contextlib.contextmanager
    def handled(self) -> Iterator[Signals]:
        """Handle the signals inside the `with` block."""
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
        """Raise Interrupted if a signal has arrived."""
        if self.count:
            raise Interrupted(self.last, "interrupted before the task began")
