"""The children that a fork server forks ahead of tasks: how many, and when the next one is forked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from flowmesh.processes.child_record import Entry, Spare
from flowmesh.processes.protocol import Fork

MANY = 2
"""With only one, a task that comes right after another would wait for the kernel."""
QUIET_S = 0.003
"""Where none is left, they are forked after so long without an event: running tasks need the CPUs more."""
QUIET_AT_LAST_S = 0.02
"""After so long they are forked whether or not there are events."""
REST_S = 0.1
"""Where one is left, the other is forked after so long without an event. After a fork the server copies each page of
memory that it writes to, so that two forks one right after the other cost little more than one."""
AGAIN_S = 1.0
"""The pause after one that could not be forked, or died while it waited: the next one may do the same."""


class Spares:
    def __init__(self, fork: Callable[[], Spare]) -> None:
        """
        Args:
            fork: forks one, or raises OSError.
        """
        self._fork = fork
        self._spares: deque[Spare] = deque()
        self._filling = True
        """Whether they are forked until there are MANY."""
        self._since = 0.0
        self._again_at = 0.0
        """Both monotonic."""

    @property
    def pids(self) -> set[int]:
        return {spare.pid for spare in self._spares}

    @property
    def pause_s(self) -> float | None:
        """After how long without an event another one is due; None: none is."""
        if len(self._spares) >= MANY or time.monotonic() < self._again_at:
            return None
        return QUIET_S if self._filling else REST_S

    def look(self, *, quiet: bool) -> None:
        """Fork what is missing if it is time. An error is dropped here: the fork for the next task reports it."""
        if not quiet and (not self._filling or time.monotonic() <= self._since + QUIET_AT_LAST_S):
            return
        try:
            while len(self._spares) < MANY:
                self._spares.append(self._fork())
        except OSError:
            self._again_at = time.monotonic() + AGAIN_S
        self._filling = not self._spares

    def hand_out(self, request: Fork, data: bytes, *, new: bool = False) -> Entry:
        """Give the task to one of them, or to a new one if there is none or they have died.

        Args:
            data: the request as it came, which the child gets as it is.
            new: to a new one in any case.

        Raises:
            OSError: none can be had.
        """
        self._since = time.monotonic()
        while self._spares and not new:
            spare = self._spares.popleft()
            self._filling = not self._spares
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
            self._filling = not self._spares
            self._again_at = time.monotonic() + AGAIN_S

    def drop(self) -> None:
        """Kill them."""
        while self._spares:
            self._spares.popleft().discard()

    @property
    def descriptors(self) -> list[int]:
        """The fork server's descriptors for them."""
        return [fd for spare in self._spares for fd in spare.descriptors]
