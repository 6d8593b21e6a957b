"""What `flowmesh top` shows, and `flowmesh top --json` prints: one moment of a node, or of a deployment.

None: not known, as where a node of an older version does not report it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    index: int | None = None
    uuid: str = ""
    name: str = ""
    worker_id: str | None = None
    utilization_percent: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    trouble: str | None = None
    """Why it does not answer."""
    sampled_s_ago: float | None = None


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    name: str | None = None
    status: str = ""
    task_id: str | None = None
    gpus: int = 0
    reason: str | None = None
    """Why it takes no tasks."""
    cost_per_hour: float | None = None
    queued: int | None = None
    seen_s_ago: float | None = None
    """Since its last heartbeat; of a deployment's workers only."""
    alive: bool = True
    load_1m: float | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    task_type: str | None = None
    worker_id: str | None = None
    state: str = ""
    phase: str | None = None
    done: float | None = None
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] = {}
    trend: dict[str, tuple[float, ...]] = {}
    """Values over the whole run so far, oldest first: `loss`, `tokens_per_s`."""
    elapsed_s: float | None = None
    queued_s: float | None = None
    gpu_joules: float | None = None
    cost_usd: float | None = None
    waits_for: str | None = None
    """What its delivery waits for."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    task_type: str | None = None
    worker_id: str | None = None
    verdict: str = ""
    error: str | None = None
    finished_at: str | None = None
    runtime_s: float | None = None
    cost_usd: float | None = None
    gpu_joules: float | None = None


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A fork server."""

    environment: str
    pid: int | None = None
    state: str = ""
    rss_bytes: float | None = None


class Host(msgspec.Struct, frozen=True, kw_only=True):
    cpu_percent: float
    cpus: int
    memory_used_bytes: float
    memory_total_bytes: float


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    of: Literal["node", "deployment"]
    about: tuple[str, ...]
    """What it is a picture of: version, pid, uptime; or the Redis address."""
    troubles: tuple[str, ...] = ()
    """What does not work, a line each."""
    gpus: tuple[Gpu, ...] = ()
    slots: tuple[Slot, ...] = ()
    running: tuple[Task, ...] = ()
    queue: tuple[Task, ...] = ()
    """The first that wait."""
    queued: int = 0
    deliveries: tuple[Task, ...] = ()
    recent: tuple[End, ...] = ()
    """The last tasks that ended, newest first."""
    servers: tuple[Server, ...] = ()
    power_w: float | None = None
    cost_per_hour: float | None = None
    host: Host | None = None

    @property
    def selectable(self) -> tuple[Task, ...]:
        return self.running + self.deliveries + self.queue


def task_of(data: dict[str, Any], **also: Any) -> Task:
    """A task from its entry in a status answer or a heartbeat; unknown fields are ignored.

    Raises:
        msgspec.ValidationError: it does not fit.
    """
    progress = data.get("progress") or {}
    return msgspec.convert({**data, **_known(progress, "done", "total", "unit", "metrics"), **also}, Task)


def end_of(data: dict[str, Any]) -> End:
    """An end, likewise."""
    energy = data.get("energy") or {}
    return msgspec.convert({**data, "gpu_joules": energy.get("gpu_joules")}, End)


def _known(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: data[name] for name in names if data.get(name) is not None}
