"""What can be asked of a running node over its control socket."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from flowmesh import installed
from flowmesh.control import drain, overview
from flowmesh.control.server import ControlError, Handler, text_field
from flowmesh.errors import FlowMeshError
from flowmesh.execution import task_events
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.orchestrator.link import Link
from flowmesh.orchestrator.worker_description import NodeDescription
from flowmesh.startup import log_writer
from flowmesh.tasks.journal import Record
from flowmesh.tasks.machine import State
from flowmesh.validation.convert import nearest


class Operations:
    """
    Args:
        stop: drains in the given mode, and ends the node.
        resume: takes a drain back; raises FlowMeshError if there is none.
        metrics: gives the node's metrics as text.
        notify: gives the receivers of notifications, and how they stand.
        end: says when the node ends by itself.
        start_anew: replaces this supervisor by a new one; raises FlowMeshError if that could not start.
    """

    def __init__(
        self,
        node: NodeDescription,
        executor: Executor,
        link: Link,
        *,
        stop: Callable[[str], None],
        resume: Callable[[], None],
        start_anew: Callable[[], Awaitable[None]],
        metrics: Callable[[], str],
        notify: Callable[[], list[dict[str, Any]]],
        end: Callable[[], dict[str, Any]],
    ) -> None:
        self._notify = notify
        self._end = end
        self._metrics = metrics
        self._node = node
        self._executor = executor
        self._link = link
        self._stop = stop
        self._resume = resume
        self._start_anew = start_anew

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self._status,
            "metrics": lambda _: {"text": self._metrics()},
            "logs": self._logs,
            "endpoint": self._endpoint,
            "cancel": self._cancel,
            "drain": self._drain,
            "undrain": self._undrain,
            "deliver": self._deliver,
            "recycle": self._recycle,
            "upgrade": self._upgrade,
        }

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        limit = request.get("limit")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise ControlError(f"limit: expected a whole number from 0, found {limit!r}")
        node, executor, presences = self._node, self._executor, self._link.registration.presences
        late = sorted(each for presence in presences.values() for each in presence.late_s)
        tasks, left_out = overview.tasks(executor, limit)
        return {
            "pid": os.getpid(),
            "version": installed.version(),
            "node_id": node.node_id,
            "uptime_s": round(time.monotonic() - node.started, 3),
            "power": msgspec.to_builtins(node.power.power(node.inventory.gpus)),
            "redis_up": self._link.up,
            "redis_troubles": self._link.troubles(),
            "draining": executor.draining,
            "ends": self._end(),
            "isolation": node.isolation,
            "task_types": executor.offered_types(),
            "results_dir": str(executor.layout.results_dir),
            "permits": {
                "read_roots": list(executor.settings.tasks.read_roots),
                "trust_remote_code": bool(executor.settings.tasks.trust_remote_code),
                "local_hosts": bool(executor.settings.tasks.local_hosts),
                "s3_read": bool(executor.settings.cloud.read),
            },
            "faults": executor.parts.conditions.listed(),
            "workers": [
                {
                    "worker_id": worker_id,
                    "slot": slot.plan.name,
                    "status": presences[worker_id].status.word,
                    "task_id": slot.current.task_id if slot.current is not None else None,
                    "gpus": list(slot.plan.gpus),
                    "reason": slot.trouble or None,
                    "cost_per_hour": round(executor.settings.node.cost_per_hour * slot.plan.share, 9),
                }
                for worker_id, slot in executor.slots.items()
            ],
            "tasks": tasks,
            "tasks_left_out": left_out,
            "gpus": executor.parts.gpus.last.listed(),
            "recent": executor.recent.listed(),
            "servers": [
                {
                    "environment": server.environment,
                    "pid": server.pid,
                    "state": server.state.value,
                    "rss_bytes": server.ready.rss_bytes if server.ready else None,
                    "preload_s": server.ready.preload_s if server.ready else None,
                }
                for server in executor.pool.servers
            ],
            "notify": self._notify(),
            "page": executor.parts.page.summary(),
            "queue": self._link.queue.summary(),
            "warnings": executor.pool.warnings(),
            "redeliveries": executor.parts.redeliveries.waits(),
            "queued": sum(len(slot.queue) for slot in executor.slots.values()),
            "log_dropped": log_writer.dropped(),
            "outbox": executor.journal.outbox_size(),
            "outbox_unheard": self._link.outbox.unheard,
            "nobody_listens": self._link.outbox.nobody_listens,
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
            raise ControlError(f"{task_id}: this node has no record of this task")
        out_dir = run.accepted.target.out_dir if run is not None else record.out_dir  # type: ignore[union-attr]
        running = run is not None and run.task.state not in (State.DELIVERING, State.DONE)
        layout = self._executor.layout
        redact = layout.secrets if run is None else task_events.redactor(run, layout)
        # In hexadecimal: the server hides secrets in what it sends.
        secrets = [each.encode(errors="surrogatepass").hex() for each in redact.known]
        return {"out_dir": out_dir, "logs_dir": str(Path(out_dir, "logs")), "running": running, "secrets": secrets}

    def _endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        task_id = text_field(request, "task_id")
        run = self._executor.runs.of_task(task_id)
        if run is None:
            raise ControlError(f"{task_id}: this node runs no such task")
        if run.endpoint is None or run.serving is None:
            raise ControlError(f"{task_id}: it serves no model now (it is {run.task.state.value} {run.phase})".rstrip())
        return {**run.endpoint, "api_key": run.serving.api_key}

    def _cancel(self, request: dict[str, Any]) -> dict[str, Any]:
        task_id = text_field(request, "task_id")
        force = request.get("force", False) is True
        state = self._executor.cancel(task_id, reason="cancelled by a user of the node", force=force)
        if state == "unknown":
            _, record = self._find(task_id)
            if record is not None and record.task.verdict is not None:
                raise ControlError(f"{task_id}: it has ended already ({record.task.verdict.kind})")
            raise ControlError(f"{task_id}: not on this node; if it is dispatched here later, it is cancelled")
        return {"state": state}

    def _drain(self, request: dict[str, Any]) -> dict[str, Any]:
        mode = request.get("mode", "finish")
        if mode not in drain.MODES:
            raise ControlError(f"mode: {mode!r} is none; {nearest(str(mode), list(drain.MODES))}")
        self._stop(mode)
        return {"tasks": len(self._executor.runs)}

    def _undrain(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._resume()
        return {"tasks": len(self._executor.runs)}

    async def _deliver(self, request: dict[str, Any]) -> dict[str, Any]:
        task_id = text_field(request, "task_id")
        run, record = self._find(task_id)
        if run is not None:
            state = run.task.state
            told = "it is being delivered now" if state is State.DELIVERING else f"it has not ended yet ({state})"
            raise ControlError(f"{task_id}: {told}")
        if record is None:
            raise ControlError(f"{task_id}: this node has no record of this task")
        report = await self._executor.parts.redeliveries.send(record)
        return {
            "task_id": task_id,
            "out_dir": record.out_dir,
            "sent_bytes": report.sent_bytes,
            "seconds": report.seconds,
            "urls": list(report.urls),
        }

    def _recycle(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request.get("environment")
        known = self._executor.pool.environments
        if name is not None and name not in known:
            raise ControlError(f"environment: unknown {name!r}; {nearest(str(name), list(known))}")
        return {"recycled": self._executor.pool.recycle(name)}

    async def _upgrade(self, _request: dict[str, Any]) -> dict[str, Any]:
        try:
            await self._start_anew()
        except FlowMeshError as error:
            raise ControlError(f"not restarted, the node keeps its version and settings: {error}") from None
        return {"tasks": len(self._executor.runs)}

    def _find(self, task_id: str) -> tuple[Run | None, Record | None]:
        run = self._executor.runs.of_task(task_id)
        return run, None if run is not None else self._executor.journal.latest(task_id)
