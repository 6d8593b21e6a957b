"""The children that a fork server has ahead of its tasks: how many, and when one more is forked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from flowmesh.processes.child_record import Entry, Spare
from flowmesh.processes.protocol import Fork

MANY = 2
"""With one alone, a task that follows the last at once would wait for the kernel."""
QUIET_S = 0.003
"""Without a word from anybody, before one is forked: what is going on wants the processors more."""
QUIET_AT_LAST_S = 0.02
"""It is forked then, quiet or not."""
AGAIN_S = 1.0
"""After one that could not be forked, or died while it waited: whatever that does, it may do to the next."""


class Ahead:
    def __init__(self, fork: Callable[[], Spare]) -> None:
        """
        Args:
            fork: makes one, or raises OSError.
        """
        self._fork = fork
        self._spares: deque[Spare] = deque()
        self._since = 0.0
        self._again_at = 0.0
        """Both monotonic."""

    @property
    def pids(self) -> set[int]:
        return {spare.pid for spare in self._spares}

    @property
    def lacking(self) -> bool:
        """Whether one is to be forked in the next quiet moment."""
        return len(self._spares) < MANY and time.monotonic() >= self._again_at

    def look(self, *, quiet: bool) -> None:
        """Fork one that is lacking, where this is the moment. Where it fails, the next task's own fork says why."""
        if quiet or time.monotonic() > self._since + QUIET_AT_LAST_S:
            self._since = time.monotonic()
            try:
                self._spares.append(self._fork())
            except OSError:
                self._again_at = time.monotonic() + AGAIN_S

    def hand_out(self, request: Fork, data: bytes) -> Entry:
        """One of them gets the task; a new one where there is none, or where they died while they waited.

        Args:
            data: the request as it came, which goes on to the child as it is.

        Raises:
            OSError: none will do.
        """
        self._since = time.monotonic()
        while self._spares:
            spare = self._spares.popleft()
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
        """A child of the server's has ended, perhaps one of these."""
        for spare in [spare for spare in self._spares if spare.pid == pid]:
            self._spares.remove(spare)
            spare.discard(reaped=True)
            self._again_at = time.monotonic() + AGAIN_S

    def drop(self) -> None:
        """End them."""
        while self._spares:
            self._spares.popleft().discard()

    def close(self) -> None:
        """Let go of their descriptors, in a child that has inherited them."""
        for spare in self._spares:
            spare.close()
