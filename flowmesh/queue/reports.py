"""Reports: the events of a task that has a record in Redis, on their way there through the node's outbox.

They are not published as they are. A script compares their attempt with the record's, and publishes the task's one end.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.messages.nodes import Gang
from flowmesh.messages.text import encode_json, encode_msgpack
from flowmesh.messages.wire import RECORDS_LANE, TASK_EVENTS_CHANNEL, Recorded, TaskEvent

PREEMPTED = "preempted"
"""The beginning of the stop's detail of a task that made room for one of high priority."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One event, with what its script needs."""

    task_id: str
    worker_id: str
    attempt: int
    queued: bool
    """Whether it came from the queue; else it was dispatched directly."""
    started: bool
    """Whether it is a TASK_STARTED; else it is an end."""
    event: bytes
    """As it is published."""
    out_dir: str = ""
    """The folder with the result; empty: there is none."""
    stays: bool = False
    """Whether its checkpoints are here, so that this node should get it back."""
    gang: Gang | None = None
    """Of a member of a task on several nodes, whose event says the task's id; `task_id` is the member's."""

    @property
    def decoded(self) -> TaskEvent:
        return _event_decoder.decode(self.event)

    @property
    def evidence(self) -> bytes:
        """What is kept of the attempt; records.Attempt reads it."""
        event = self.decoded
        payload = event.payload
        kept: dict[str, Any] = {
            "attempt": self.attempt,
            "worker_id": self.worker_id,
            "ended_at": event.ts,
            "ok": event.type == "TASK_SUCCEEDED",
            "error_kind": payload.get("error_kind", ""),
            "error": "" if event.error is msgspec.UNSET else event.error,
            "exit": payload.get("exit"),
            "log_tail": payload.get("log_tail", []),
            "runtime_s": payload.get("runtime_sec"),
        }
        if self.gang is not None:
            kept["rank"] = self.gang.rank
        return encode_json(kept)

    def member(self, gang: Gang, node_id: str) -> bytes:
        """What the gang's terminal event says of this member."""
        event = self.decoded
        told = {
            "rank": gang.rank,
            "worker_id": self.worker_id,
            "node_id": node_id,
            "verdict": "ok" if event.type == "TASK_SUCCEEDED" else event.payload.get("error_kind", "error"),
            "error": "" if event.error is msgspec.UNSET else event.error,
            "runtime_sec": event.payload.get("runtime_sec"),
        }
        return encode_json(told)


_event_decoder = msgspec.json.Decoder(TaskEvent)
_decoder = msgspec.msgpack.Decoder(Report)


def outgoing(event: bytes, recorded: Recorded | None, *, out_dir: str = "", stays: bool = False) -> tuple[str, bytes]:
    """The outbox's channel and payload for an event of a task.

    Args:
        event: encoded, as `tasks.events` carries it.
        recorded: None: the task has no record in Redis, and its event is published as it is.
    """
    if recorded is None:
        return TASK_EVENTS_CHANNEL, event
    told = _event_decoder.decode(event)
    gang = recorded.gang
    if gang is not None:
        event = encode_json(_as_the_gangs(told, gang))
    report = Report(
        task_id=told.task_id,
        worker_id=told.worker_id,
        attempt=recorded.attempt,
        queued=bool(recorded.priority),
        started=told.type == "TASK_STARTED",
        event=event,
        out_dir=out_dir,
        stays=stays,
        gang=gang,
    )
    return RECORDS_LANE, encode_msgpack(report)


def _as_the_gangs(event: TaskEvent, gang: Gang) -> TaskEvent:
    """A member's event as that of its task."""
    error = event.error
    if error is not msgspec.UNSET:
        error = f"member {gang.rank} on {event.worker_id}: {error}"
    return msgspec.structs.replace(event, task_id=gang.task_id, error=error)


def decode(payload: bytes) -> Report:
    """The report in the outbox.

    Raises:
        msgspec.DecodeError: another version wrote it.
    """
    return _decoder.decode(payload)
