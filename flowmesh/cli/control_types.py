"""What a node answers on its control socket, as far as this client uses it. Unknown fields are ignored."""

from __future__ import annotations

from typing import Any

import msgspec


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    slot: str | int | None = None
    status: str = ""
    task_id: str | None = None
    gpus: tuple[Any, ...] = ()
    reason: str | None = None
    """Why it takes no tasks."""


class FaultStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of the node that holds now."""

    name: str
    reason: str = ""
    since_s: float = 0.0
    workers: tuple[str, ...] = ()


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a task. `total` is None where it is unknown."""

    done: float = 0.0
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] | None = None


class TaskStatus(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    task_type: str | None = None
    state: str = ""
    phase: str | None = None
    progress: Done | None = None
    pid: int | None = None
    started_at: str | None = None
    out_dir: str | None = None
    waits_for: str | None = None
    """What its delivery waits for."""


class ReceiverStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A receiver of notifications."""

    to: str
    waiting: int = 0
    sent: int = 0
    dropped: int = 0
    """Unsent: too many waited, or for too long."""
    error: str | None = None
    """Why the last attempt failed."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """When a node's time is over."""

    at: str
    drains_at: str
    left_s: float = 0.0
    """Until the drain."""


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """When a node ends by itself."""

    end: End | None = None
    exit_when_idle_s: float | None = None
    idle_s: float | None = None
    """How long it has had no task; None: it has one."""


class PageStatus(msgspec.Struct, frozen=True, kw_only=True):
    listen: str
    state: str
    """`starting`, `listening` or `failed`."""
    error: str | None = None


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    version: str = ""
    uptime_s: float = 0.0
    redis_up: bool = False
    redis_troubles: tuple[str, ...] = ()
    draining: str | None = None
    ends: Ends = Ends()
    isolation: str = ""
    workers: tuple[WorkerStatus, ...] = ()
    tasks: tuple[TaskStatus, ...] = ()
    queued: int = 0
    outbox: int = 0
    faults: tuple[FaultStatus, ...] = ()
    nobody_listens: bool = False
    """Whether the last task event had no receivers."""
    log_dropped: int = 0
    notify: tuple[ReceiverStatus, ...] = ()
    page: PageStatus | None = None
    """None: `web.listen` is not set."""
    warnings: dict[str, str] = {}
    """By environment: why its tasks fail, or start slowly."""
    redeliveries: dict[str, str] = {}
    """Of `flowmesh deliver`, by task id: what each waits for; empty: it is being sent."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """Of a task that the node took."""

    worker_id: str
    waits: int = 0
    """How many tasks come before it."""
    refused: str | None = None
    """Why it ended at once: its document cannot run."""
    verdict: str | None = None
    """Of one that was refused."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task serves a model."""

    base_url: str
    api_key: str
    model: str


class LogsPlace(msgspec.Struct, frozen=True, kw_only=True):
    out_dir: str
    logs_dir: str
    running: bool = False
    secrets: tuple[str, ...] = ()
    """Of the node and of a task that it still has, in hexadecimal: hidden in what is printed."""


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    out_dir: str = ""
    sent_bytes: int = 0
    seconds: float = 0.0
    urls: tuple[str, ...] = ()


class StateSeen(msgspec.Struct, frozen=True, tag_field="event", tag="state"):
    state: str


class PhaseSeen(msgspec.Struct, frozen=True, tag_field="event", tag="phase"):
    phase: str
    endpoint: dict[str, str] | None = None
    """Of a task that serves a model: `base_url` and `model`."""


class ProgressSeen(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="progress"):
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="end"):
    ok: bool
    verdict: str | None = None
    error: str | None = None
    out_dir: str | None = None
    payload: dict[str, Any] = {}
    """Of the terminal event; empty for a task that had ended before."""


Seen = StateSeen | PhaseSeen | ProgressSeen | Ended
