"""What a pipeline's driver needs of the place where its tasks run, and what that place reports."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task to run."""

    task_id: str
    document: dict[str, Any]
    """With `merge_children`."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The task runs."""

    task_id: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a running task does."""

    task_id: str
    text: str
    fraction: float | None = None
    """Of its present phase, from 0 to 1."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a task."""

    task_id: str
    ok: bool
    verdict: str | None = None
    error: str | None = None
    out_dir: str | None = None
    result: dict[str, Any] | None = None
    """As in responses.json, merged children included; of a task that failed perhaps also."""
    worker: str | None = None
    """None: of this machine."""


Event = Started | Seen | Ended


class Port(Protocol):
    """Runs tasks."""

    def slots(self) -> int:
        """How many tasks can run at once."""

    def submit(self, task: Task) -> bool:
        """Start a task; False: not now, ask again after the next event.

        Raises:
            FlowMeshError: it cannot run here at all.
        """

    def cancel(self, task_id: str, *, force: bool) -> None:
        """Ask a task to end; its `Ended` follows."""

    def next(self) -> Event | None:
        """Wait for the next event, a moment at most.

        Raises:
            FlowMeshError: the place is gone.
        """
