"""Builds the events that are published on `tasks.events`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.messages.text import escaped
from flowmesh.messages.wire import TaskEvent, encode, utc_now
from flowmesh.redaction import Redactor, in_document
from flowmesh.results.job import DeliveryReport
from flowmesh.results.partial import steps_shown
from flowmesh.tasks.verdicts import Kind, Verdict, event_fields

TAIL_LINES = 20
TAIL_BYTES = 4096
"""How much of its log the event of a failed task contains. responses.json contains more."""


def started(run: Run) -> bytes:
    """TASK_STARTED, encoded."""
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


MAX_WARNINGS = 20
WARNING_BYTES = 500
WARNINGS_BYTES = 4096
"""How many of a task's warnings its event carries, and how much of them. The result has all."""


_decoder = msgspec.json.Decoder(TaskEvent)


def is_start(event: bytes) -> bool:
    """Whether an encoded event is a TASK_STARTED; all others here are terminal."""
    return event.startswith(b'{"type":"TASK_STARTED"')


def failed_at(event: bytes) -> str | None:
    """The worker whose task failed, if this encoded event is a TASK_FAILED; else None."""
    return _decoder.decode(event).worker_id if event.startswith(b'{"type":"TASK_FAILED"') else None


def payload_of(event: bytes) -> dict[str, Any]:
    """The payload of an encoded event, as `payload`."""
    return {"payload": _decoder.decode(event).payload}


def used(run: Run, cost_per_hour: float) -> dict[str, Any]:
    """What a task has used, for its event and its result. An energy that was not measured is null.

    Args:
        cost_per_hour: of the task's slot, in US dollars.
    """
    return {
        "cost_usd": round(cost_per_hour / 3600 * run.runtime_s, 9),
        "energy": run.energy,
        "resources": run.resources | _rows(run),
    }


def _rows(run: Run) -> dict[str, Any]:
    """The rows of a task that keeps a row log, `resources.rows`."""
    counts = run.delivered.rows if run.delivered is not None else None
    counts = counts or (None if run.outcome is None else run.outcome.rows)
    return {} if counts is None else {"rows": msgspec.to_builtins(counts)}


def ended(run: Run, verdict: Verdict, *, finished_at: str, cost_per_hour: float, redact: Redactor) -> bytes:
    """The terminal event, encoded: TASK_SUCCEEDED or TASK_FAILED.

    Args:
        finished_at: ISO 8601, UTC.
        cost_per_hour: of the task's slot, in US dollars.
        redact: hides the secrets of the node and of the task.
    """
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
    if run.outcome is not None and run.outcome.command is not None:
        payload["command"] = msgspec.to_builtins(run.outcome.command)
    if warnings := _bounded([redact(line) for line in warnings_of(run)]):
        payload["warnings"] = warnings
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
        if run.delivered is not None:
            payload |= _finished(run.task_id, run.delivered)
        if run.log_tail:
            payload["log_tail"] = _last([escaped(redact(line)) for line in run.log_tail[-TAIL_LINES:]])
        event = TaskEvent(
            type="TASK_FAILED",
            ts=finished_at,
            worker_id=run.worker_id,
            task_id=run.task_id,
            status="FAILED",
            error=escaped(redact(verdict.message)),
            payload=payload,
        )
    return encode(event)


def _finished(task_id: str, report: DeliveryReport) -> dict[str, Any]:
    """`rows`, `resume` and `steps` of a failed task; each merged child with rows has its own."""
    found: dict[str, Any] = {} if report.steps is None else {"steps": steps_shown(report.steps)}
    if report.rows is None:
        return found
    found["rows"] = {"done": report.rows.done, "total": report.rows.total}
    for each, part in report.parts.items():
        resume = {} if part.resume is None else {"resume": part.resume}
        if each == task_id:
            found |= resume
        else:
            children = found["rows"].setdefault("children", {})
            children[each] = {"done": part.done, "total": part.total, **resume}
    return found


def warnings_of(run: Run) -> list[str]:
    """The node's own warnings about a task, then the runner's."""
    return [*run.accepted.warnings, *(run.outcome.warnings if run.outcome is not None else ())]


def _bounded(lines: Sequence[str]) -> list[str]:
    """The first warnings, each cut, as many as an event may carry; the rest is counted."""
    kept, room = [], WARNINGS_BYTES
    for line in lines[:MAX_WARNINGS]:
        cut = line.encode()[:WARNING_BYTES].decode(errors="ignore")
        room -= len(cut.encode())
        if room < 0:
            break
        kept.append(cut)
    if more := len(lines) - len(kept):
        kept.append(f"and {more} more in responses.json")
    return kept


def refused(worker_id: str, task_id: str, kind: Kind, message: str, dispatched_at: str | None) -> bytes:
    """For a task that was never accepted: what it asks for cannot be done, or not here."""
    return lost(worker_id, task_id, Verdict(kind=kind, message=message), dispatched_at)


def lost(worker_id: str, task_id: str, verdict: Verdict, dispatched_at: str | None) -> bytes:
    """TASK_FAILED for a task of which only the id is known."""
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
        error=escaped(verdict.message),
        payload=payload,
    )
    return encode(event)


def redactor(run: Run, layout: Layout) -> Redactor:
    """Hides the secrets of the node and of the task."""
    task = in_document(run.accepted.task, layout.base_env)
    served = None if run.served is None else run.served.api_key
    return Redactor([*layout.secrets.known, *task, served], prose=True)


def _last(lines: Sequence[str]) -> list[str]:
    """The last lines that fit into TAIL_BYTES; of the first one kept, only its end may fit."""
    kept: list[str] = []
    room = TAIL_BYTES
    for line in reversed(lines):
        if room <= 0:
            break
        end = line.encode()[-room:].decode(errors="ignore")
        room -= len(end.encode()) + 1
        kept.append(end)
    return kept[::-1]
