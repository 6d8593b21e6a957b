"""The events of `tasks.events`, built from a run."""

from __future__ import annotations

from typing import Any

from flowmesh.execution.run import Run
from flowmesh.messages.wire import TaskEvent, encode, utc_now
from flowmesh.tasks.verdicts import Kind, Verdict, event_fields


def started(run: Run) -> bytes:
    payload = {
        "taskType": run.accepted.type.name,
        "dispatched_at": run.accepted.message.dispatched_at,
        "started_at": run.started_at,
    }
    event = TaskEvent(
        type="TASK_STARTED",
        ts=utc_now(),
        worker_id=run.worker_id,
        task_id=run.task_id,
        status="RUNNING",
        payload=payload,
    )
    return encode(event)


def is_start(event: bytes) -> bool:
    """Whether an event tells of a beginning; all others here tell of an end."""
    return event.startswith(b'{"type":"TASK_STARTED"')


def used(run: Run, cost_per_hour: float) -> dict[str, Any]:
    """What a task has used, for its event and its result. Of an energy that is not known: null."""
    return {
        "cost_usd": round(cost_per_hour / 3600 * run.runtime_s, 9),
        "energy": run.energy,
        "resources": run.resources,
    }


def ended(run: Run, verdict: Verdict, *, finished_at: str, cost_per_hour: float) -> bytes:
    payload: dict[str, Any] = {
        "taskType": run.accepted.type.name,
        "runtime_sec": round(run.runtime_s, 6),
        "started_at": run.started_at,
        "finished_at": finished_at,
        **used(run, cost_per_hour),
        "phases": {} if run.outcome is None else run.outcome.phases,
    }
    if run.accepted.message.dispatched_at is not None:
        payload["dispatched_at"] = run.accepted.message.dispatched_at
    if verdict.ok:
        event = TaskEvent(
            type="TASK_SUCCEEDED",
            ts=finished_at,
            worker_id=run.worker_id,
            task_id=run.task_id,
            status="DONE",
            payload=payload,
        )
    else:
        payload |= event_fields(verdict)
        event = TaskEvent(
            type="TASK_FAILED",
            ts=finished_at,
            worker_id=run.worker_id,
            task_id=run.task_id,
            status="FAILED",
            error=verdict.message,
            payload=payload,
        )
    return encode(event)


def refused(worker_id: str, task_id: str, message: str, dispatched_at: str | None) -> bytes:
    """For a task that was never accepted: what it asks for cannot be done."""
    return lost(worker_id, task_id, Verdict(kind=Kind.BAD_REQUEST, message=message), dispatched_at)


def lost(worker_id: str, task_id: str, verdict: Verdict, dispatched_at: str | None) -> bytes:
    """For a task of which nothing is known but its id."""
    now = utc_now()
    payload: dict[str, Any] = {
        "taskType": None,
        "runtime_sec": 0.0,
        "started_at": None,
        "finished_at": now,
        **event_fields(verdict),
    }
    if dispatched_at is not None:
        payload["dispatched_at"] = dispatched_at
    event = TaskEvent(
        type="TASK_FAILED",
        ts=now,
        worker_id=worker_id,
        task_id=task_id,
        status="FAILED",
        error=verdict.message,
        payload=payload,
    )
    return encode(event)
