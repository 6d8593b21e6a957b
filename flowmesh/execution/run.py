"""One attempt at a task, from its acceptance to its end: state, process, times, progress and what it used."""

from __future__ import annotations

import asyncio
import datetime
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec

from flowmesh.execution import boot_clock
from flowmesh.execution.admission import Accepted
from flowmesh.execution.trend import Trend
from flowmesh.messages.job import Exit, Outcome
from flowmesh.messages.serving import Numbers, Served, believed
from flowmesh.messages.wire import Recorded, utc_now
from flowmesh.node.slots import Slot
from flowmesh.processes.pipe import Pipe, Progress, Serving
from flowmesh.results.job import DeliveryReport
from flowmesh.tasks.machine import State, Task

MOST_METRICS = 8
MOST_UNIT_CHARS = 32
"""Of a bounded snapshot's progress, which the task wrote."""


class Timeline:
    """When what happened to a run, for the history."""

    def __init__(self) -> None:
        now = time.time()
        self.marks: dict[str, float] = {"received": now, State.QUEUED.value: now}
        """When it was received, and when it entered each state, in seconds since 1970."""

    @property
    def received_at(self) -> str:
        """ISO 8601, UTC."""
        return datetime.datetime.fromtimestamp(self.marks["received"], datetime.UTC).isoformat()

    def enter(self, state: State) -> None:
        """It enters a state now."""
        self.marks[state.value] = time.time()

    def resume(self, marks: dict[str, float], received_at: str) -> None:
        """Take over what an earlier supervisor recorded; one of an older version records no marks."""
        received = datetime.datetime.fromisoformat(received_at).timestamp()
        self.marks = {"received": received, State.QUEUED.value: received, **marks}


class Run:
    """One attempt. Owned by the executor, and used on the event loop only.

    Args:
        attempt: its number, unique on this node.
        slot: the slot that it runs in, or is queued for.
    """

    serving: Serving | None = None
    """The model that it serves, with its key."""
    served_numbers = Numbers()
    """What its served model has counted."""
    served: Served | None = None
    """The model of another task that its document names, with its key."""
    prepared: dict[str, float] | None = None
    """What was done for it while it waited for its slot; None: nothing."""
    finished_frame = False
    """Whether its child said that its outcome is in the spool folder."""

    def __init__(self, attempt: int, accepted: Accepted, slot: Slot[Run]) -> None:
        self.attempt = attempt
        self.accepted = accepted
        self.slot = slot
        self.task = Task()
        self.pid: int | None = None
        self.pipe: Pipe | None = None
        self.cgroup: str | None = None
        """The folder of its cgroup, if it has one."""
        self.phase = ""
        self.waits_for = ""
        """What its delivery waits for; empty: it does not wait."""
        self.progress: Progress | None = None
        """The last progress that it reported."""
        self.trend = Trend()
        self.last_frame_at = time.monotonic()
        """When its last frame arrived, or it started."""
        self.bad_frames = 0
        self.waiting: asyncio.Task[Any] | None = None
        """Set while it waits for its environment's fork server to finish its imports, or for a served model."""
        self.started_at: str | None = None
        """When it started, ISO 8601, UTC."""
        self.boot_mark = ""
        """When it started, from `boot_clock.mark`."""
        self.started = 0.0
        """When it started, monotonic; computed from `boot_mark` for an adopted task. 0: it has not started."""
        self.queued_at = time.monotonic()
        """When it was accepted, or this supervisor found it, monotonic."""
        self.fork_asked = 0.0
        """When its fork server was asked for its process, monotonic. 0: it was not, or by an earlier supervisor."""
        self.faulted_at = 0.0
        """When it first met a fault of the node, monotonic. 0: it has not, or it was launched since."""
        self.unready = 0
        """How often its process could not be set up for a reason that concerns this task only."""
        self.finished = 0.0
        """When it ended, monotonic. 0: it has not ended."""
        self.exit: Exit | None = None
        self.outcome: Outcome | None = None
        self.delivered: DeliveryReport | None = None
        """What its delivery found; of a failed task also what it had finished."""
        self.log_tail: tuple[str, ...] = ()
        """The last lines of a failed task's log."""
        self.timeline = Timeline()
        self.resources: dict[str, Any] = {}
        self.energy: dict[str, Any] | None = None
        self.gpus = gpus_of(accepted, slot)
        """UUIDs of its GPUs."""
        self.timers: list[asyncio.TimerHandle] = []
        self.watchers: set[Callable[[dict[str, Any]], None]] = set()
        """Called with each event of this task, for clients that watch it."""

    @property
    def task_id(self) -> str:
        return self.accepted.message.task_id

    @property
    def recorded(self) -> Recorded | None:
        """Which attempt of a task with a record in Redis it is; None: the task has no record."""
        return self.accepted.message.record

    @property
    def gang_id(self) -> str | None:
        """The task on several nodes of which it is a member; None: it is none."""
        return None if self.recorded is None or self.recorded.gang is None else self.recorded.gang.task_id

    @property
    def worker_id(self) -> str:
        return self.slot.plan.worker_id

    @property
    def runtime_s(self) -> float:
        """How long it has run so far, or ran; 0 if it has not started."""
        return (self.finished or time.monotonic()) - self.started if self.started else 0.0

    def start_clock(self) -> None:
        """It starts now."""
        self.faulted_at = 0.0
        self.started = self.last_frame_at = time.monotonic()  # no frame could come while it was queued
        self.started_at = utc_now()
        self.boot_mark = boot_clock.mark()

    def resume_clock(self) -> None:
        """Count an adopted task's time from when it started, under the earlier supervisor."""
        assert self.started_at is not None, "only a task that had started is adopted"
        self.started = time.monotonic() - boot_clock.age_s(self.boot_mark, self.started_at)

    def end_clock(self) -> None:
        """It ended when its fork server measured its end; now if that is unknown."""
        if self.finished:
            return  # ended under an earlier supervisor
        ran_s = 0.0 if self.exit is None else self.exit.ran_s
        self.finished = self.started + ran_s if ran_s and self.started else time.monotonic()

    def enter(self, phase: str) -> None:
        """Set its phase, cut to 64 characters."""
        self.phase = phase[:64]
        self.notify({"event": "phase", "phase": self.phase})

    def serve(self, endpoint: Serving) -> bool:
        """Set where it serves a model, and what it has counted; returns whether where is news."""
        self.served_numbers = believed(endpoint.numbers, endpoint.times)
        endpoint = msgspec.structs.replace(endpoint, numbers={}, times={})
        if endpoint == self.serving:
            return False
        self.serving = endpoint
        self.notify({"event": "phase", "phase": self.phase, "endpoint": self.endpoint})
        return True

    @property
    def endpoint(self) -> dict[str, str] | None:
        """Where it serves a model, without the key; None: it serves none now."""
        if self.serving is None or not self.serving.ready or not self.keeps_endpoint:
            return None
        return {"base_url": self.serving.base_url, "model": self.serving.model}

    @property
    def keeps_endpoint(self) -> bool:
        """Whether it serves a model, or has served one and loads it again."""
        return self.serving is not None and self.task.state is State.RUNNING and not self.finished_frame

    def wait_for(self, what: str) -> None:
        """Set what its delivery waits for; empty: it waits no longer."""
        self.waits_for = what

    def notify(self, event: dict[str, Any]) -> None:
        """Send an event to the clients that watch this task."""
        for watcher in list(self.watchers):
            watcher(event)

    def end_timers(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()

    def usage(self) -> dict[str, Any]:
        """What the kernel counted for its first process, including children that this process waited for."""
        ahead = {} if self.prepared is None else {"prepared": self.prepared}
        if self.exit is None:
            return ahead
        return {
            **ahead,
            "cpu_seconds": round(self.exit.user_cpu_s + self.exit.system_cpu_s, 6),
            "peak_rss_bytes": self.exit.peak_rss_bytes,
            "processes_swept": self.exit.swept,
            "gone_ms": self.exit.gone_ms,
        }

    def snapshot(self, *, bounded: bool = False) -> dict[str, Any]:
        """The task's entry in `flowmesh status`.

        Args:
            bounded: cut what the task may have made long in its progress.
        """
        progress = None if self.progress is None else msgspec.to_builtins(_plain(self.progress))
        if progress is not None and bounded:
            progress["unit"] = progress["unit"][:MOST_UNIT_CHARS]
            progress["metrics"] = {
                name[:MOST_UNIT_CHARS]: value for name, value in list(progress["metrics"].items())[:MOST_METRICS]
            }
        return {
            "task_id": self.task_id,
            "task_type": self.accepted.type.name,
            "worker_id": self.worker_id,
            "attempt": self.attempt,
            "state": self.task.state.value,
            "phase": self.phase,
            "progress": progress,
            "rows": self._live_rows(),
            "endpoint": self.endpoint,
            "pid": self.pid if self.task.state not in (State.QUEUED, State.DELIVERING) else None,
            "started_at": self.started_at,
            "out_dir": self.accepted.target.out_dir,
            "waits_for": self.waits_for or None,
            "elapsed_s": round(self.runtime_s, 3) if self.started else None,
            "queued_s": round(time.monotonic() - self.queued_at, 3) if self.task.state is State.QUEUED else None,
            "gpus": list(self.gpus),
        }

    def _live_rows(self) -> dict[str, int] | None:
        """Of a task that keeps a row log, as its last progress said."""
        last = self.progress
        if last is None or "rows" not in last.metrics or not math.isfinite(last.metrics["rows"]):
            return None
        total = last.total if last.total is not None and math.isfinite(last.total) else 0.0
        return {"done": int(last.metrics["rows"]), "total": int(total)}


def gpus_of(accepted: Accepted, slot: Slot[Run]) -> tuple[str, ...]:
    """UUIDs of the GPUs that a task gets: its slot's, at most `gpu.count` of them; none for a light task."""
    if accepted.type.is_light:
        return ()
    hardware = accepted.spec.resources.hardware if accepted.spec.resources else None
    return slot.plan.gpus_for(hardware.gpu.count if hardware and hardware.gpu else None)


def progress_event(progress: Progress) -> dict[str, Any]:
    """The event of a progress frame, for the clients that watch its task."""
    return {"event": "progress", **_plain(progress)}


def _plain(progress: Progress) -> dict[str, Any]:
    return {
        "done": progress.done,
        "total": progress.total,
        "unit": progress.unit,
        "metrics": progress.metrics,
    }
