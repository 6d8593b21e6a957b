"""The children that a fork server forks ahead of tasks: how many, and when the next one is forked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from flowmesh.processes.child_record import Entry, Spare
from flowmesh.processes.protocol import Fork

MANY = 2
"""With only one, a task that comes right after another would wait for the kernel."""
LATE_S = 0.02
"""Where none is left, they are forked when no task runs, or so long after the last one was given away: running tasks
need the CPUs more, and the end of one is to be noted at once."""
REST_S = 0.1
"""Where one is left, the other is forked after so long without an event. After a fork the server copies each page of
memory that it writes to, so that two forks one right after the other cost little more than one."""
AGAIN_S = 1.0
"""The pause after one that could not be forked, or died while it waited: the next one may do the same."""


class Spares:
    def __init__(self, fork: Callable[[], Spare], awaited: Callable[[], bool]) -> None:
        """
        Args:
            fork: forks one, or raises OSError.
            awaited: whether the fork server has something else to do: perhaps a task has come.
        """
        self._fork = fork
        self._awaited = awaited
        self._spares: deque[Spare] = deque()
        self._empty_at = 0.0
        """Since when none has been left."""
        self._again_at = 0.0
        """Both monotonic."""

    @property
    def pids(self) -> set[int]:
        return {spare.pid for spare in self._spares}

    @property
    def pause_s(self) -> float | None:
        """After how long without an event another one is due; None: none is."""
        now = time.monotonic()
        if len(self._spares) >= MANY or now < self._again_at:
            return None
        return REST_S if self._spares else max(0.0, self._empty_at + LATE_S - now)

    def look(self, *, idle: bool, quiet: bool) -> None:
        """Fork what is missing if it is time. An error is dropped here: the fork for the next task reports it.

        Args:
            idle: no task runs.
            quiet: nothing has happened for as long as `pause_s` said.
        """
        now = time.monotonic()
        due = quiet or (not self._spares and (idle or now >= self._empty_at + LATE_S))
        if not due or now < self._again_at:
            return
        try:
            while len(self._spares) < MANY:
                self._spares.append(self._fork())
                if self._awaited():
                    break
        except OSError:
            self._again_at = time.monotonic() + AGAIN_S

    def hand_out(self, request: Fork, data: bytes, *, new: bool = False) -> Entry:
        """Give the task to one of them, or to a new one if there is none or they have died.

        Args:
            data: the request as it came, which the child gets as it is.
            new: to a new one in any case.

        Raises:
            OSError: none can be had.
        """
        while self._spares and not new:
            spare = self._spares.popleft()
            if not self._spares:
                self._empty_at = time.monotonic()
            try:
                return spare.take(request, data)
            except OSError:
                spare.discard()
        spare = self._fork()
        try:
            return spare.take(request, data)
        except OSError:
            spare.discard()
            raise

    def reaped(self, pid: int) -> None:
        """A child of the fork server was reaped; it may be one of these."""
        for spare in [spare for spare in self._spares if spare.pid == pid]:
            self._spares.remove(spare)
            spare.discard(reaped=True)
            self._again_at = time.monotonic() + AGAIN_S

    def drop(self) -> None:
        """Kill them."""
        while self._spares:
            self._spares.popleft().discard()

    @property
    def descriptors(self) -> list[int]:
        """The fork server's descriptors for them."""
        return [fd for spare in self._spares for fd in spare.descriptors]
