"""What clients read of tasks in Redis: the state of a task, its end, its events."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flowmesh.messages.nodes import Nodes
from flowmesh.messages.wire import usable_task_id

TERMINAL = ("TASK_SUCCEEDED", "TASK_FAILED")


FIELDS = (
    "state", "type", "name", "owner", "priority", "worker_id", "attempt", "failures", "retries", "queued_at",
    "started_at", "ended_at", "ok", "verdict", "error", "least", "most", "size",
)  # fmt: skip
"""Of a record: what a TaskState is made of. A record also has the whole document while its task waits."""
END_FIELDS = ("state", "attempt", "end", "priority", "worker_id")
"""Of a record: what an End is made of, and who has a task that has not ended."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a task: a message on `tasks.events`, or an attempt that failed and is tried again."""

    type: str
    """`TASK_STARTED`, `TASK_SUCCEEDED`, `TASK_FAILED`, `ATTEMPT_FAILED`; `QUEUED` where its record says no more."""
    task_id: str
    worker_id: str = ""
    ts: str = ""
    error: str = ""
    payload: dict[str, Any] = {}

    @property
    def terminal(self) -> bool:
        return self.type in TERMINAL


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended: its one terminal event."""

    task_id: str
    kind: str
    """`TASK_SUCCEEDED` or `TASK_FAILED`."""
    verdict: str
    """`ok`, or the event's `error_kind`."""
    error: str = ""
    """One line; empty for a success."""
    worker_id: str = ""
    retryable: bool = False
    """Whether another worker might succeed where this one failed."""
    warnings: tuple[str, ...] = ()
    runtime_s: float | None = None
    attempts: int = 1
    """How often it was tried, as far as that is recorded."""
    payload: dict[str, Any] = {}
    """The event's payload."""

    @property
    def ok(self) -> bool:
        return self.kind == "TASK_SUCCEEDED"


class TaskState(msgspec.Struct, frozen=True, kw_only=True):
    """A task as its record in Redis has it."""

    task_id: str
    state: str
    """`queued`, `claimed`, `running`, `dispatched` (sent to a worker directly, not started yet), or `done`."""
    task_type: str = ""
    name: str = ""
    owner: str = ""
    priority: str = ""
    """Empty: it was not queued."""
    worker_id: str = ""
    attempt: int = 0
    failures: int = 0
    """Of earlier attempts."""
    retries: int = 0
    queued_at: str = ""
    started_at: str = ""
    ended_at: str = ""
    ok: bool | None = None
    """None: it has not ended."""
    verdict: str = ""
    error: str = ""
    nodes: str = ""
    """Of a task on several nodes: how many it has, or, while it waits, asks for (`2`, `2-4`). Empty: it is on one."""

    @property
    def ended(self) -> bool:
        return self.state == "done"


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one attempt that ended."""

    attempt: int
    worker_id: str = ""
    node_id: str = ""
    ended_at: str = ""
    ok: bool = False
    error_kind: str = ""
    error: str = ""
    exit: dict[str, Any] | None = None
    log_tail: tuple[str, ...] = ()
    runtime_s: float | None = None
    rank: int | None = None
    """Which member it was of a task on several nodes, each of which has an entry for an attempt."""


def text(value: Any) -> str:
    """A value from Redis as text; empty for one that is not there."""
    return value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)


def fields_of(answer: Any) -> dict[str, str]:
    """The answer to HGETALL."""
    return {text(name): text(value) for name, value in (answer or {}).items()}


def some_of(names: Sequence[str], answer: Any) -> dict[str, str]:
    """The answer to HMGET of these names, without what is not there."""
    return {name: text(value) for name, value in zip(names, answer, strict=True) if value is not None}


def state_of(task_id: str, fields: Mapping[str, str]) -> TaskState | None:
    """The task of a record; None where there is none."""
    if not fields.get("state"):
        return None
    ok = fields.get("ok", "")
    return TaskState(
        task_id=task_id,
        state=fields["state"],
        task_type=fields.get("type", ""),
        name=fields.get("name", ""),
        owner=fields.get("owner", ""),
        priority=fields.get("priority", ""),
        worker_id="" if fields["state"] == "queued" else fields.get("worker_id", ""),
        attempt=_number(fields.get("attempt")),
        failures=_number(fields.get("failures")),
        retries=_number(fields.get("retries")),
        queued_at=fields.get("queued_at", ""),
        started_at=fields.get("started_at", ""),
        ended_at=fields.get("ended_at", ""),
        ok=None if ok == "" else ok == "1",
        verdict=fields.get("verdict", ""),
        error=fields.get("error", ""),
        nodes=_nodes(fields),
    )


def _nodes(fields: Mapping[str, str]) -> str:
    wanted = Nodes(_number(fields.get("least")), _number(fields.get("most")))
    return fields.get("size", wanted.text) if wanted.is_gang else ""


def event_of(data: Any) -> Event | None:
    """The event in a message, or in a record's `end`; None for what is none."""
    try:
        raw = json.loads(data)
    except (TypeError, ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or usable_task_id(raw.get("task_id")) is None or not isinstance(raw.get("type"), str):
        return None
    payload = raw.get("payload")
    if raw["type"] == "ATTEMPT_FAILED":
        payload = {name: raw[name] for name in ("attempt", "error_kind") if name in raw}
    return Event(
        type=raw["type"],
        task_id=raw["task_id"],
        worker_id=str(raw.get("worker_id") or ""),
        ts=str(raw.get("ts") or ""),
        error=str(raw.get("error") or ""),
        payload=payload if isinstance(payload, dict) else {},
    )


def end_of(event: Event, attempts: int = 1) -> End:
    """The end that a terminal event reports."""
    payload = event.payload
    warnings = payload.get("warnings")
    runtime = payload.get("runtime_sec")
    return End(
        task_id=event.task_id,
        kind=event.type,
        verdict="ok" if event.type == "TASK_SUCCEEDED" else str(payload.get("error_kind") or "error"),
        error=event.error,
        worker_id=event.worker_id,
        retryable=payload.get("retryable") is True,
        warnings=tuple(map(str, warnings)) if isinstance(warnings, list) else (),
        runtime_s=float(runtime) if isinstance(runtime, int | float) else None,
        attempts=max(1, attempts),
        payload=payload,
    )


def end_in(fields: Mapping[str, str]) -> End | None:
    """The end in a record; None while there is none."""
    event = event_of(fields["end"]) if fields.get("state") == "done" and "end" in fields else None
    return None if event is None else end_of(event, _number(fields.get("attempt")))


def attempts_of(answer: Sequence[Any]) -> list[Attempt]:
    """The evidence of a task's attempts, in the order in which they ended."""
    found = []
    for each in answer:
        try:
            found.append(msgspec.json.decode(each, type=Attempt, strict=False))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return found


def milliseconds(now: datetime.datetime) -> int:
    return int(now.timestamp() * 1000)


def _number(value: str | None) -> int:
    return int(value) if value and value.lstrip("-").isdigit() else 0
