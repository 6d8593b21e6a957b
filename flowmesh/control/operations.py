"""What can be asked of a running node, on its control socket and on the deployment's control channel."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from loguru import logger

from flowmesh import __version__
from flowmesh.control.server import ControlError, Handler, text_field
from flowmesh.errors import FieldError, FlowMeshError
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run, progress_event
from flowmesh.messages.checking import nearest
from flowmesh.messages.wire import decode_object, usable_task_id
from flowmesh.orchestrator.registration import Workers
from flowmesh.orchestrator.worker_description import About
from flowmesh.tasks.journal import Record
from flowmesh.tasks.machine import State

DRAIN_MODES = ("finish", "checkpoint", "now")
Watcher = Callable[[dict[str, Any]], None]


class Operations:
    """
    Args:
        stop: drains in the mode that it is given, and ends the node.
        start_anew: has a new supervisor take this one's place; raises FlowMeshError where that could not start.
    """

    def __init__(
        self,
        about: About,
        executor: Executor,
        workers: Workers,
        *,
        stop: Callable[[str], None],
        start_anew: Callable[[], Awaitable[None]],
    ) -> None:
        self._about = about
        self._executor = executor
        self._workers = workers
        self._stop = stop
        self._start_anew = start_anew
        self._waiting: dict[str, set[Watcher]] = {}

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self._status,
            "logs": self._logs,
            "cancel": self._cancel,
            "drain": self._drain,
            "deliver": self._deliver,
            "recycle": self._recycle,
            "upgrade": self._upgrade,
        }

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _status(self, _request: dict[str, Any]) -> dict[str, Any]:
        about, executor, presences = self._about, self._executor, self._workers.presences
        late = sorted(each for presence in presences.values() for each in presence.late_s)
        return {
            "pid": os.getpid(),
            "version": __version__,
            "node_id": about.node_id,
            "uptime_s": round(time.monotonic() - about.started, 3),
            "redis_up": self._workers.uplink.up,
            "redis_troubles": self._workers.uplink.troubles(),
            "draining": executor.draining,
            "isolation": about.isolation,
            "task_types": sorted(executor.catalogue.offered),
            "workers": [
                {
                    "worker_id": worker_id,
                    "slot": slot.plan.name,
                    "status": presences[worker_id].status.word,
                    "task_id": slot.current.task_id if slot.current is not None else None,
                    "gpus": list(slot.plan.gpus),
                    "reason": slot.trouble or None,
                }
                for worker_id, slot in executor.slots.items()
            ],
            "tasks": [run.snapshot() for run in executor.runs.values()],
            "servers": [
                {
                    "environment": server.lane,
                    "pid": server.pid,
                    "state": server.state.value,
                    "rss_bytes": server.ready.rss_bytes if server.ready else None,
                    "preload_s": server.ready.preload_s if server.ready else None,
                }
                for server in executor.fleet.servers
            ],
            "warnings": executor.fleet.warnings(),
            "queued": sum(len(slot.queue) for slot in executor.slots.values()),
            "outbox": executor.journal.outbox_size(),
            "malformed": executor.counters.malformed,
            "refused": executor.counters.refused,
            "duplicates": executor.counters.duplicates,
            "verdicts": executor.counters.verdicts,
            "heartbeat_late_s": late[-1] if late else 0.0,
            "heartbeat_late_p99_s": late[int(len(late) * 0.99)] if late else 0.0,
        }

    def _logs(self, request: dict[str, Any]) -> dict[str, Any]:
        task_id = text_field(request, "task_id")
        run, record = self._find(task_id)
        if run is None and record is None:
            raise ControlError(f"{task_id}: this node knows no such task")
        out_dir = run.accepted.target.out_dir if run is not None else record.out_dir  # type: ignore[union-attr]
        running = run is not None and run.task.state not in (State.DELIVERING, State.DONE)
        return {"out_dir": out_dir, "logs_dir": str(Path(out_dir, "logs")), "running": running}

    def _cancel(self, request: dict[str, Any]) -> dict[str, Any]:
        task_id = text_field(request, "task_id")
        force = request.get("force", False) is True
        state = self._executor.cancel(task_id, reason="cancelled by a user of the node", force=force)
        if state == "unknown":
            _, record = self._find(task_id)
            if record is not None and record.task.verdict is not None:
                raise ControlError(f"{task_id}: it has ended already ({record.task.verdict.kind})")
            raise ControlError(f"{task_id}: this node has no such task; should it still come, it is cancelled")
        return {"state": state}

    def _drain(self, request: dict[str, Any]) -> dict[str, Any]:
        mode = request.get("mode", "finish")
        if mode not in DRAIN_MODES:
            raise ControlError(f"mode: {mode!r} is none; {nearest(str(mode), list(DRAIN_MODES))}")
        self._stop(mode)
        return {"tasks": len(self._executor.runs)}

    async def _deliver(self, request: dict[str, Any]) -> dict[str, Any]:
        task_id = text_field(request, "task_id")
        run, record = self._find(task_id)
        if run is not None:
            state = run.task.state
            told = "it is being delivered now" if state is State.DELIVERING else f"it has not ended yet ({state})"
            raise ControlError(f"{task_id}: {told}")
        if record is None:
            raise ControlError(f"{task_id}: this node knows no such task")
        deliveries = self._executor.deliveries
        report = await deliveries.again.send(record, deliveries.fork)
        return {
            "task_id": task_id,
            "out_dir": record.out_dir,
            "sent_bytes": report.sent_bytes,
            "seconds": report.seconds,
            "urls": list(report.urls),
        }

    def _recycle(self, request: dict[str, Any]) -> dict[str, Any]:
        lane = request.get("environment")
        lanes = self._executor.fleet.lanes
        if lane is not None and lane not in lanes:
            raise ControlError(f"environment: unknown {lane!r}; {nearest(str(lane), list(lanes))}")
        return {"recycled": self._executor.fleet.recycle(lane)}

    async def _upgrade(self, _request: dict[str, Any]) -> dict[str, Any]:
        try:
            await self._start_anew()
        except FlowMeshError as error:
            raise ControlError(f"not started anew, the old version and settings stay: {error}") from None
        return {"tasks": len(self._executor.runs)}

    def _find(self, task_id: str) -> tuple[Run | None, Record | None]:
        run = self._executor.by_id.get(task_id)
        return run, None if run is not None else self._executor.journal.latest(task_id)

    # ---- the control channel -----------------------------------------------------------------------------------------

    def on_channel(self, data: bytes) -> None:
        """A message on the deployment's control channel. It goes to every node; most will not have the task."""
        try:
            message = decode_object(data)
        except FieldError as error:
            logger.warning("control message ignored: {}", error)
            return
        task_id = usable_task_id(message.get("task_id"))
        if message.get("type") != "CANCEL" or task_id is None:
            logger.warning("control message ignored: only CANCEL with a task_id is known")
            return
        reason = message.get("reason")
        self._executor.cancel(
            task_id,
            reason=reason[:200] if isinstance(reason, str) and reason else "cancelled",
            force=message.get("force") is True,
            checkpoint=message.get("checkpoint") is True,
        )

    # ---- watching ----------------------------------------------------------------------------------------------------

    def subscribe(self, task_id: str, put: Watcher) -> Callable[[], None]:
        """Tell `put` what happens to a task from now on; one that has not come yet is waited for."""
        run, record = self._find(task_id)
        if run is not None:
            put({"event": "state", "state": run.task.state.value})
            if run.phase:
                put({"event": "phase", "phase": run.phase})
            if run.progress is not None:
                put(progress_event(run.progress))
            run.watchers.add(put)
        elif record is not None and record.task.verdict is not None:
            verdict = record.task.verdict
            end = {"ok": verdict.ok, "verdict": verdict.kind.value, "error": verdict.message}
            put({"event": "end", **end, "out_dir": record.out_dir})
        else:
            self._waiting.setdefault(task_id, set()).add(put)

        def unsubscribe() -> None:
            if run is not None:
                run.watchers.discard(put)
            if (waiting := self._waiting.get(task_id)) is not None:
                waiting.discard(put)
                if not waiting:
                    del self._waiting[task_id]
            if (later := self._executor.by_id.get(task_id)) is not None:
                later.watchers.discard(put)

        return unsubscribe

    def on_accepted(self, run: Run) -> None:
        """Those who waited for this task watch it from its first moment."""
        run.watchers |= self._waiting.pop(run.task_id, set())
        run.tell({"event": "state", "state": run.task.state.value})

    def on_refused(self, task_id: str, message: str) -> None:
        for put in self._waiting.pop(task_id, set()):
            put({"event": "end", "ok": False, "verdict": "bad_request", "error": message, "out_dir": None})
