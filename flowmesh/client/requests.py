"""What clients ask of Redis, without any I/O: each request yields commands and is sent their answers.

`Client` and `AsyncClient` run the same requests, one with blocking calls and one with awaits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import msgspec

from flowmesh.client.shapes import checked, encoded, id_or_new, name_of, shaped, time_limit_of
from flowmesh.errors import BusyError, FieldError, FlowMeshError, UnavailableError
from flowmesh.messages import wire
from flowmesh.messages.nodes import FROM_QUEUE, LONGEST_ID, gang_of_member, nodes_of
from flowmesh.messages.nodes import WHERE as NODES
from flowmesh.queue import names, scripts
from flowmesh.queue.classes import class_of, owner_of
from flowmesh.queue.lua import Script
from flowmesh.queue.names import Priority
from flowmesh.queue.records import (
    END_FIELDS,
    FIELDS,
    Attempt,
    End,
    Event,
    TaskState,
    attempts_of,
    end_in,
    some_of,
    state_of,
    text,
)
from flowmesh.queue.workers import (
    Worker,
    choose,
    ids_of,
    reads,
    refuse_unless_possible,
    type_of,
    workers_of,
)

T = TypeVar("T")
Command = tuple[Any, ...]
"""A command's words; or a Script and its arguments."""
Request = Generator[list[Command], list[Any], T]
"""Yields commands that are sent together; is sent their answers."""

MAX_RETRIES = 100
FOLLOW_S = 30
"""How long a node writes logs after a follower was last there."""
POLL_S = 2.0
"""Between two looks at a record while its events are awaited: an event may have been missed."""
OUTAGE_POLL_S = 0.5
POSSIBLE_S = 10.0
"""How long a worker that fits a class is believed to be there: many tasks of a class are queued with one look."""
LOST_S = 30.0
"""How long a task that was known may have no record and no worker: after a restart of Redis, nodes register again."""
ALL_SHOWN = 1000
"""Ended tasks that are listed at most."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task that was submitted or queued."""

    task_id: str
    worker_id: str | None = None
    """The worker that it was sent to; None: it is queued."""
    warning: str = ""
    """What the submitter should know; empty: nothing."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a running task serves a model."""

    base_url: str
    """For clients of OpenAI's API; ends with `/v1`."""
    api_key: str
    """Whoever has it may use the model."""
    model: str
    """The name that requests give it."""

    def __repr__(self) -> str:
        return f"Endpoint(base_url={self.base_url!r}, model={self.model!r})"


class NoEndpoint(FlowMeshError):
    """The task serves no model now."""


class TaskExists(FlowMeshError):
    """A task of this id has not ended."""


class UnknownTask(FlowMeshError):
    """No record of a task, and no worker that runs it."""


class WorkerGone(UnknownTask):
    """The worker that a task was sent to directly has no heartbeat: its outcome is unknown until its node is back."""


class NoResult(FlowMeshError):
    """There is no result of a task in Redis."""


def queue(
    document: Mapping[str, Any],
    *,
    priority: str = "normal",
    retries: int = 2,
    task_id: str | None = None,
    anyway: bool = False,
    possible: dict[str, float],
) -> Request[Task]:
    """
    Args:
        possible: the classes that a worker was found for, and when (monotonic); kept between requests.
    """
    check_queueing(document, priority, retries)
    wanted, nodes = class_of(document), nodes_of(document)
    place = f"{wanted.key}:{nodes.least}"
    if not anyway and time.monotonic() - possible.get(place, float("-inf")) > POSSIBLE_S:
        refuse_unless_possible((yield from workers()), wanted, nodes=nodes)
        possible[place] = time.monotonic()
    task_id = id_or_new(task_id)
    if nodes.is_gang and len(task_id) > LONGEST_ID:
        raise FieldError(f"task_id: at most {LONGEST_ID} characters for a task on several nodes", "task_id")
    arguments = (
        task_id, wire.utc_now(), wanted.member, wanted.key, priority, owner_of(document), retries, encoded(document),
        type_of(document) or "", name_of(document), time_limit_of(document), nodes.least, nodes.most,
    )  # fmt: skip
    (answer,) = yield [(scripts.QUEUE, *arguments)]
    if text(answer) == "exists":
        raise TaskExists(f"{task_id}: a task of this id has not ended; choose another one, or wait for it")
    return Task(task_id=task_id)


def check_queueing(document: Mapping[str, Any], priority: str, retries: int) -> None:
    """Check what a task or a pipeline is queued with.

    Raises:
        FieldError: names the argument.
    """
    shaped(document)
    if priority not in list(Priority):
        raise FieldError(f"priority: {priority!r} is none; use high, normal or low", "priority")
    if not isinstance(retries, int) or not 0 <= retries <= MAX_RETRIES:
        raise FieldError(f"retries: expected a number from 0 to {MAX_RETRIES}, found {retries!r}", "retries")


def submit(
    document: Mapping[str, Any],
    *,
    worker: str | None = None,
    task_id: str | None = None,
    topic: str = "tasks",
    check_size: bool = True,
) -> Request[Task]:
    shaped(document)
    if nodes_of(document).is_gang:
        raise FieldError(FROM_QUEUE, NODES)
    chosen = choose((yield from workers()), document, worker)
    task_id, at = id_or_new(task_id), wire.utc_now()
    name, kind, owner = name_of(document), type_of(document), owner_of(document)
    (attempt,) = yield [(scripts.DISPATCHED, task_id, at, chosen.worker_id, kind or "", owner, name)]
    if not int(attempt):
        raise TaskExists(f"{task_id}: a task of this id has not ended; choose another one, or wait for it")
    message = {
        "task_id": task_id,
        "task": document,
        "task_type": kind,
        "assigned_worker": chosen.worker_id,
        "dispatched_at": at,
        "parent_task_id": None,
        "record": {"attempt": int(attempt)},
    }
    data = encoded(message) if check_size else json.dumps(message, ensure_ascii=False).encode()
    (heard,) = yield [("PUBLISH", topic, data)]
    if not int(heard):
        yield [("DEL", names.record_key(task_id)), ("ZREM", names.OPEN, task_id)]
        raise UnavailableError(
            f"no subscriber on the channel {topic!r}: check that the node of {chosen.worker_id} is connected, "
            "and that its redis.task_topic is the same"
        )
    return Task(task_id=task_id, worker_id=chosen.worker_id)


def workers() -> Request[list[Worker]]:
    (members,) = yield [("SMEMBERS", wire.WORKER_IDS)]
    ids = ids_of(members)
    return workers_of(ids, (yield list(reads(ids))))


def tasks(*, every: bool = False) -> Request[list[TaskState]]:
    """Recorded tasks that have not ended, oldest first, then what workers run without a record; then ended ones."""
    listed = [("ZRANGE", names.OPEN, 0, -1), *([("ZREVRANGE", names.DONE, 0, ALL_SHOWN - 1)] if every else [])]
    answers = yield listed
    ids = [text(each) for answer in (answers[0], *(reversed(list(each)) for each in answers[1:])) for each in answer]
    found, lost = [], []
    for task_id, answer in zip(ids, (yield from _records(ids)), strict=True):
        state = state_of(task_id, some_of(FIELDS, answer))
        if state is not None:
            found.append(state)
        else:
            lost.append(task_id)
    if lost:
        yield [("ZREM", key, *lost) for key in (names.OPEN, names.DONE)]
    known = set(ids)

    def task_of(task_id: str) -> str:
        return task_id if task_id in known else gang_of_member(task_id)

    for worker in (yield from workers()):
        if worker.task_id and worker.status == "RUNNING" and worker.alive and task_of(worker.task_id) not in known:
            found.append(TaskState(task_id=worker.task_id, state="running", worker_id=worker.worker_id))
    return found


def _records(ids: list[str]) -> Request[list[Any]]:
    if not ids:
        return []
    return (yield [("HMGET", names.record_key(task_id), *FIELDS) for task_id in ids])


def state(task_id: str) -> Request[TaskState | None]:
    checked(task_id)
    (answer,) = yield [("HMGET", names.record_key(task_id), *FIELDS)]
    return state_of(task_id, some_of(FIELDS, answer))


def endpoint(task_id: str) -> Request[Endpoint | None]:
    """Where a task serves a model; None: it serves none now."""
    checked(task_id)
    (answer,) = yield [("HMGET", names.endpoint_key(task_id), "base_url", "api_key", "model")]
    base_url, api_key, model = ("" if each is None else text(each) for each in answer)
    return Endpoint(base_url=base_url, api_key=api_key, model=model) if base_url and api_key else None


def no_endpoint(task_id: str, ended: End | None) -> FlowMeshError:
    """The error of a task that serves no model."""
    if ended is None:
        return NoEndpoint(f"{task_id}: it serves no model now; a task of the type serve does once it is loaded")
    why = f": {ended.error}" if ended.error else ""
    return NoEndpoint(f"{task_id}: it has ended ({ended.verdict or 'ok'}){why}")


def end(task_id: str) -> Request[End | None]:
    """The task's end; None: it has not ended.

    Raises:
        UnknownTask: no record of it, and no worker has it.
        WorkerGone: it was sent to a worker that is gone; what was queued is taken over instead.
    """
    checked(task_id)
    (answer,) = yield [("HMGET", names.record_key(task_id), *END_FIELDS)]
    fields = some_of(END_FIELDS, answer)
    if fields.get("state"):
        found = end_in(fields)
        if found is None and not fields.get("priority"):
            worker_id = fields.get("worker_id", "")
            (ttl,) = yield [("TTL", wire.heartbeat_key(worker_id))]
            if int(ttl) <= 0:
                raise WorkerGone(
                    f"{worker_id} is gone (no heartbeat): the outcome of {task_id} is unknown until its node is back"
                )
        return found
    if not any(task_id == worker.task_id for worker in (yield from workers())):
        raise UnknownTask(
            f"{task_id}: no record of this task in Redis, and no worker runs it; records stay for a day after the end"
        )
    return None


def attempts(task_id: str) -> Request[list[Attempt]]:
    checked(task_id)
    (answer,) = yield [("LRANGE", names.attempts_key(task_id), 0, -1)]
    return attempts_of(answer)


def result(task_id: str) -> Request[dict[str, Any]]:
    checked(task_id)
    found, record = yield [("GET", names.result_key(task_id)), ("HMGET", names.record_key(task_id), *FIELDS)]
    if found is not None:
        content: dict[str, Any] = json.loads(found)
        return content
    task = state_of(task_id, some_of(FIELDS, record))
    if task is None:
        raise NoResult(
            f"{task_id}: no record of this task in Redis; of tasks that were not submitted by `flowmesh` or its "
            "client, and of those older than a day, the result is in RESULTS_DIR on their node"
        )
    if not task.ended:
        raise NoResult(f"{task_id}: it has not ended yet ({task.state})")
    why = f" ({task.verdict}: {task.error})" if not task.ok else ""
    raise NoResult(f"{task_id}: it ended on {task.worker_id or 'no worker'}{why}, and its result is not kept in Redis")


def cancel(task_id: str, *, reason: str = "cancelled", force: bool = False) -> Request[str]:
    checked(task_id)
    (answer,) = yield [(scripts.CANCEL, task_id, wire.utc_now(), reason[:200] or "cancelled", int(force))]
    was = text(answer)
    if was in ("queued", "done"):
        return was
    message = {"type": "CANCEL", "task_id": task_id, "force": force, "reason": reason}
    yield [("PUBLISH", names.CONTROL_CHANNEL, json.dumps(message, ensure_ascii=False))]
    return was


def follow(task_id: str, token: str, *, keep: bool) -> Request[None]:
    """Ask the node that has the task to write its log lines.

    Args:
        token: names the stream that they are written to.
        keep: until the task ends, for as long as this is repeated; False: those that there are now.
    """
    message = {"type": "LOGS", "task_id": task_id, "to": token, "follow": keep}
    yield [
        ("SET", names.follow_key(token), "1", "EX", FOLLOW_S),
        ("PUBLISH", names.CHANNEL, json.dumps(message)),
    ]


def script_call(script: Script, arguments: tuple[Any, ...], *, whole: bool) -> Command:
    """The command that runs a script: by its name, or with its text where Redis does not know it yet."""
    return ("EVAL", script.text, 0, *arguments) if whole else ("EVALSHA", script.sha, 0, *arguments)


def first_event(state: TaskState | None) -> Event | None:
    """What a record says has happened so far; None: there is none, or the task has ended."""
    if state is None or state.ended:
        return None
    kind = "TASK_STARTED" if state.state == "running" else "QUEUED"
    return Event(type=kind, task_id=state.task_id, worker_id=state.worker_id, ts=state.started_at or state.queued_at)


def is_again(event: Event, first: Event | None) -> bool:
    """Whether an event was told already, as what the record says."""
    return first is not None and (event.type, event.worker_id) == (first.type, first.worker_id)


def shown_end(end: End) -> Event:
    """The event of an end that a record has."""
    at = str(end.payload.get("finished_at") or "")
    return Event(
        type=end.kind, task_id=end.task_id, worker_id=end.worker_id, ts=at, error=end.error, payload=end.payload
    )


def late(task_id: str, timeout_s: float) -> BusyError:
    return BusyError(f"{task_id} has not ended after {timeout_s:g} s; it continues")


def no_answer(task_id: str, seconds: float) -> UnavailableError:
    return UnavailableError(
        f"{task_id}: no node sent its logs within {seconds:g} s; it waits in the queue, its node does not run, is "
        "older, or has removed its folder"
    )
