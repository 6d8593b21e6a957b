"""One attempt at a task while the node has it: its machine state, its process, its last progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from flowmesh.execution import boot_clock
from flowmesh.execution.admission import Accepted
from flowmesh.messages.job import Exit, Outcome
from flowmesh.messages.wire import utc_now
from flowmesh.node.slots import Slot
from flowmesh.processes.pipe import Pipe, Progress
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.types import LIGHT


class Run:
    """Owned by the executor; used on the loop only."""

    def __init__(self, attempt: int, accepted: Accepted, slot: Slot[Run]) -> None:
        self.attempt = attempt
        self.accepted = accepted
        self.slot = slot
        self.task = Task()
        self.pid: int | None = None
        self.pipe: Pipe | None = None
        self.cgroup: str | None = None
        self.phase = ""
        self.progress: Progress | None = None
        self.last_heard = time.monotonic()
        self.bad_frames = 0
        self.waiting: asyncio.Task[None] | None = None
        """Set while it waits for its environment's fork server to finish its imports."""
        self.started_at: str | None = None
        self.boot_mark = ""
        """When it started, by `boot_clock.mark`."""
        self.started = 0.0
        """Monotonic; computed from `boot_mark` for an adopted task. 0: it has not started."""
        self.finished = 0.0
        """Monotonic; 0: it has not ended."""
        self.exit: Exit | None = None
        self.outcome: Outcome | None = None
        self.log_tail: tuple[str, ...] = ()
        """The last lines of a failed task's log."""
        self.resources: dict[str, Any] = {}
        self.energy: dict[str, Any] | None = None
        self.gpus = gpus_of(accepted, slot)
        self.timers: list[asyncio.TimerHandle] = []
        self.watchers: set[Callable[[dict[str, Any]], None]] = set()

    @property
    def task_id(self) -> str:
        return self.accepted.message.task_id

    @property
    def worker_id(self) -> str:
        return self.slot.plan.worker_id

    @property
    def runtime_s(self) -> float:
        return (self.finished or time.monotonic()) - self.started if self.started else 0.0

    def start_clock(self) -> None:
        self.started = self.last_heard = time.monotonic()  # in the queue it could send nothing
        self.started_at = utc_now()
        self.boot_mark = boot_clock.mark()

    def resume_clock(self) -> None:
        """For an adopted task: its time counts from when it started, under the earlier supervisor."""
        assert self.started_at is not None, "only a task that had started is adopted"
        self.started = time.monotonic() - boot_clock.age_s(self.boot_mark, self.started_at)

    def end_clock(self) -> None:
        """It ended when its fork server saw it end, if that is known; else now."""
        if self.finished:
            return  # ended under an earlier supervisor
        ran_s = 0.0 if self.exit is None else self.exit.ran_s
        self.finished = self.started + ran_s if ran_s and self.started else time.monotonic()

    def enter(self, phase: str) -> None:
        self.phase = phase[:64]
        self.tell({"event": "phase", "phase": self.phase})

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event to those who watch this task."""
        for watcher in list(self.watchers):
            watcher(event)

    def end_timers(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()

    def usage(self) -> dict[str, Any]:
        """What the kernel counted for its first process and the children which that waited for."""
        if self.exit is None:
            return {}
        return {
            "cpu_seconds": round(self.exit.user_cpu_s + self.exit.system_cpu_s, 6),
            "peak_rss_bytes": self.exit.peak_rss_bytes,
            "processes_swept": self.exit.swept,
            "gone_ms": self.exit.gone_ms,
        }

    def snapshot(self) -> dict[str, Any]:
        """For `flowmesh status`."""
        return {
            "task_id": self.task_id,
            "task_type": self.accepted.type.name,
            "worker_id": self.worker_id,
            "attempt": self.attempt,
            "state": self.task.state.value,
            "phase": self.phase,
            "progress": None if self.progress is None else msgspec.to_builtins(_plain(self.progress)),
            "pid": self.pid if self.task.state not in (State.QUEUED, State.DELIVERING) else None,
            "started_at": self.started_at,
            "out_dir": self.accepted.target.out_dir,
        }


def gpus_of(accepted: Accepted, slot: Slot[Run]) -> tuple[str, ...]:
    """UUIDs of the GPUs that a task gets: its slot's, at most `gpu.count` of them; none for a light task."""
    if accepted.type.environment == LIGHT:
        return ()
    wanted = accepted.spec.resources.hardware if accepted.spec.resources else None
    return slot.plan.gpus_for(wanted.gpu.count if wanted and wanted.gpu else None)


def progress_event(progress: Progress) -> dict[str, Any]:
    return {"event": "progress", **_plain(progress)}


def _plain(progress: Progress) -> dict[str, Any]:
    return {
        "done": progress.done,
        "total": progress.total,
        "unit": progress.unit,
        "metrics": progress.metrics,
    }
