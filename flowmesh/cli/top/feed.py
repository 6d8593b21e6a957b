"""Fetches pictures in a thread, so that a node or a Redis that hangs never holds up the screen."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

from flowmesh.cli.control import NotPermitted
from flowmesh.cli.control_types import LogsPlace
from flowmesh.cli.top.picture import Picture
from flowmesh.errors import ConfigError, FlowMeshError


class Source(Protocol):
    """Where pictures come from."""

    can_follow_logs: bool

    def fetch(self) -> Picture:
        """Raises FlowMeshError."""

    def cancel(self, task_id: str) -> str:
        """Returns what to say; raises FlowMeshError."""

    def logs(self, task_id: str) -> LogsPlace:
        """Raises FlowMeshError."""

    def close(self) -> None:
        """Called in the thread that fetches."""


class Feed:
    """
    Args:
        every_s: between two fetches.
        changed: called in the feed's thread, after each fetch and each answer.
    """

    def __init__(self, source: Source, every_s: float, changed: Callable[[], None]) -> None:
        self._source = source
        self._every_s = every_s
        self._changed = changed
        self._now = threading.Event()
        self._cancels: list[str] = []
        self._ended = False
        self.picture: Picture | None = None
        """The last one."""
        self.taken_at = 0.0
        """When that was, monotonic."""
        self.error: FlowMeshError | None = None
        """Why the last fetch failed; None: it did not."""
        self.fatal: BaseException | None = None
        """What no waiting mends: another user's node, settings that cannot be used, a bug here."""
        self.said: str | None = None
        """The answer to the last cancel; whoever shows it sets it to None."""
        self._thread = threading.Thread(target=self._run, name="top-feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Does not wait for a fetch that hangs."""
        self._ended = True
        self._now.set()

    def cancel(self, task_id: str) -> None:
        """Cancel a task soon."""
        self._cancels.append(task_id)
        self._now.set()

    def _run(self) -> None:
        while not self._ended:
            self._now.clear()
            while self._cancels:
                self._cancel(self._cancels.pop(0))
            try:
                self.picture, self.error = self._source.fetch(), None
                self.taken_at = time.monotonic()
            except (NotPermitted, ConfigError) as error:
                self.fatal = error
            except FlowMeshError as error:
                self.error = error
            except Exception as error:  # noqa: BLE001 - raised by who shows the pictures
                self.fatal = error
            self._changed()
            self._now.wait(self._every_s)
        with contextlib.suppress(Exception):
            self._source.close()

    def _cancel(self, task_id: str) -> None:
        try:
            self.said = self._source.cancel(task_id)
        except FlowMeshError as error:
            self.said = f"not cancelled: {error}"
