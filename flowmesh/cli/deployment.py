"""Reads a deployment's state from Redis: its workers, and the terminal events of tasks; records a dispatch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh.cli import locate
from flowmesh.cli.documents import Submission
from flowmesh.errors import FlowMeshError
from flowmesh.messages import wire
from flowmesh.queue import names, scripts, workers
from flowmesh.queue.classes import owner_of
from flowmesh.queue.workers import Worker, requirements_of, why_not

if TYPE_CHECKING:
    import redis

__all__ = ["TaskEnd", "TaskFailed", "Worker", "requirements_of", "why_not"]

TERMINAL = ("TASK_SUCCEEDED", "TASK_FAILED")


class TaskFailed(FlowMeshError):
    """The task ended with TASK_FAILED, or cannot run here."""

    @classmethod
    def of(cls, task_id: str, verdict: Any, error: str | None) -> TaskFailed:
        """The failure of a task; `verdict` is shown if it says more than "error"."""
        kind = f" ({verdict})" if isinstance(verdict, str) and verdict not in ("", "error") else ""
        return cls(f"{task_id} failed{kind}: {error or 'no reason given'}")


class TaskEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A terminal event of `tasks.events`."""

    task_id: str
    worker_id: str
    ok: bool
    error: str
    payload: dict[str, Any]


def read_workers(client: redis.Redis) -> list[Worker]:
    """All registered workers, sorted by id."""
    ids = workers.ids_of(client.smembers(wire.WORKER_IDS))
    pipe = client.pipeline(transaction=False)
    for command in workers.reads(ids):
        pipe.execute_command(*command)  # type: ignore[no-untyped-call]
    return workers.workers_of(ids, pipe.execute())


def record(client: redis.Redis, submission: Submission, worker_id: str) -> int | None:
    """Record in Redis that a task is dispatched, for `flowmesh ps` and `result`.

    Returns:
        the number of the attempt; None where this login may not write records.

    Raises:
        FlowMeshError: a task of this id has not ended.
    """
    import redis

    document = submission.document
    name = (document.get("metadata") or {}).get("name") if isinstance(document.get("metadata"), dict) else None
    arguments = (
        submission.task_id, wire.utc_now(), worker_id, submission.task_type or "", owner_of(document), str(name or ""),
    )  # fmt: skip
    try:
        attempt = int(client.eval(scripts.DISPATCHED.text, 0, *arguments))
    except redis.ResponseError:
        return None
    if not attempt:
        raise FlowMeshError(f"{submission.task_id}: a task of this id has not ended; choose another --task-id")
    return attempt


def forget(client: redis.Redis, task_id: str) -> None:
    """Remove the record of a task that nobody received."""
    client.delete(names.record_key(task_id))
    client.zrem(names.OPEN, task_id)


def is_alive(client: redis.Redis, worker_id: str) -> bool:
    return bool(client.ttl(wire.heartbeat_key(worker_id)) > 0)


@contextlib.contextmanager
def subscribed(client: redis.Redis, *channels: str) -> Iterator[redis.client.PubSub]:
    """A subscription that the server has confirmed: every message published from now on arrives."""
    with client.pubsub() as events:  # type: ignore[no-untyped-call]
        events.subscribe(*channels)
        for _ in channels:
            events.get_message(timeout=locate.TIMEOUT_S)
        yield events


def decode_event(message: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The event in a message of `get_message()`; None if it is no JSON object."""
    if message is None or message["type"] != "message":
        return None
    event: Any
    try:
        event = json.loads(message["data"])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def terminal_event(event: Mapping[str, Any], task_id: str) -> TaskEnd | None:
    """The outcome of the task, if `event` is its terminal event."""
    if event.get("task_id") != task_id or event.get("type") not in TERMINAL:
        return None
    payload = event.get("payload")
    return TaskEnd(
        task_id=task_id,
        worker_id=str(event.get("worker_id") or ""),
        ok=event["type"] == "TASK_SUCCEEDED",
        error=str(event.get("error") or ""),
        payload=payload if isinstance(payload, dict) else {},
    )
