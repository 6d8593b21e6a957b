"""Runs a pipeline's tasks on a deployment's nodes, through its queue."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from flowmesh.client import connection, requests
from flowmesh.client.requests import POLL_S, Request, TaskExists
from flowmesh.client.shapes import encoded, name_of, time_limit_of
from flowmesh.messages import wire
from flowmesh.messages.nodes import nodes_of
from flowmesh.pipeline_driver.job import Job
from flowmesh.pipeline_driver.lease import Lease, Lost
from flowmesh.pipeline_driver.origins import Origins
from flowmesh.pipelines.ports import Ended, Event, Started, Task
from flowmesh.queue import names, scripts
from flowmesh.queue.classes import class_of, owner_of
from flowmesh.queue.records import END_FIELDS, end_in, event_of, some_of, text
from flowmesh.queue.workers import refuse_unless_possible, type_of

MOST_TASKS = 1000
"""Of one pipeline in the queue at once."""
WAIT_S = 1.0
LOST_S = requests.LOST_S
_CHUNK = 200


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How a pipeline's stages are queued."""

    priority: str
    retries: int
    possible: frozenset[str]
    """Keys of requirement classes that fitted a worker when the pipeline was submitted."""
    anyway: bool
    """Queue also what fits no worker."""


class QueuePort:
    """
    Args:
        terms: how tasks are queued.
        run_of: the id of a task's run, from the stage's run and all ids that run in it.
    """

    def __init__(
        self,
        job: Job,
        lease: Lease,
        terms: Terms,
        origins: Origins,
        *,
        slots: int,
        run_of: Callable[[Task, tuple[str, ...]], str],
    ) -> None:
        self._job = job
        self._lease = lease
        self._terms = terms
        self._origins = origins
        self._slots = slots
        self._run_of = run_of
        self._running: dict[str, Task] = {}
        self._started: set[str] = set()
        self._missing: dict[str, float] = {}
        """Tasks without a record, and since when (monotonic)."""
        self._events: deque[Event] = deque()
        self._looked = float("-inf")
        self._redis = connection.open_client(job.url)
        self._heard = self._redis.pubsub()  # type: ignore[no-untyped-call]
        self._subscribed = False

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._heard.close()
            self._redis.close()

    def slots(self) -> int:
        return self._slots

    def submit(self, task: Task) -> bool:
        """See `Port.submit`.

        Raises:
            FieldError, NeverFits, TaskExists: it cannot run.
        """
        if len(self._running) >= MOST_TASKS:
            return False
        children = tuple(child["task_id"] for child in task.document.get("merge_children", ()))
        ids = (task.task_id, *children)
        answer = self._lease.ask(lambda: self._queue(task, self._run_of(task, children), ids))
        if answer == "lost":
            raise Lost("another driver has the pipeline, or it has ended")
        if answer == "exists":
            raise TaskExists(
                f"{task.task_id}: another task of this id has not ended; wait for it, or give the pipeline another id"
            )
        self._running[task.task_id] = task
        if answer == "cancelled":
            self._events.append(_cancelled(task.task_id, "the pipeline is cancelled"))
            self._lease.renew()
        elif answer == "same":
            self._looked = float("-inf")  # perhaps it has ended already
        return True

    def cancel(self, task_id: str, *, force: bool) -> None:
        reason = self._lease.cancelled or "another part of its stage failed"
        self._lease.ask(lambda: requests.cancel(task_id, reason=reason, force=force))

    def next(self) -> Event | None:
        """See `Port.next`.

        Raises:
            Lost, HandedOver: this driver has to end.
        """
        self._lease.keep()
        if not self._events:
            self._listen()
        if not self._events and time.monotonic() - self._looked >= POLL_S:
            self._looked = time.monotonic()
            self._look(list(self._running))
        event = self._events.popleft() if self._events else None
        if isinstance(event, Ended):
            self._running.pop(event.task_id, None)
            self._started.discard(event.task_id)
        return event

    def _queue(self, task: Task, run: str, ids: tuple[str, ...]) -> Request[str]:
        document = task.document
        wanted, nodes = class_of(document), nodes_of(document)
        if not self._terms.anyway and wanted.key not in self._terms.possible:
            refuse_unless_possible((yield from requests.workers()), wanted, f"the task {task.task_id}", nodes)
        arguments = (
            task.task_id, wire.utc_now(), wanted.member, wanted.key, self._terms.priority, owner_of(document),
            self._terms.retries, encoded(document), type_of(document) or "", name_of(document),
            time_limit_of(document), nodes.least, nodes.most,
            self._job.pipeline_id, self._job.attempt, run, json.dumps(ids),
        )  # fmt: skip
        (answer,) = yield [(scripts.QUEUE, *arguments)]
        return text(answer)

    def _listen(self) -> None:
        """Wait for messages about our tasks."""
        import redis

        try:
            if not self._subscribed:
                self._heard.subscribe(wire.TASK_EVENTS_CHANNEL, names.CONTROL_CHANNEL)
                self._subscribed = True
            message = self._heard.get_message(timeout=WAIT_S)
        except (redis.RedisError, OSError):
            self._looked = float("-inf")  # what was said meanwhile is in the records
            time.sleep(WAIT_S / 2)
            return
        ended: list[str] = []
        while message is not None:
            if message["type"] == "message":
                self._on_message(message, ended)
            try:
                message = self._heard.get_message(timeout=0)
            except (redis.RedisError, OSError):
                break
        if ended:
            self._look(list(dict.fromkeys(ended)))

    def _on_message(self, message: dict[str, Any], ended: list[str]) -> None:
        event = event_of(message["data"])
        if event is None:
            return
        if message["channel"] == names.CONTROL_CHANNEL.encode():
            if event.task_id == self._job.pipeline_id:
                self._lease.renew()
        elif event.task_id in self._running:
            if event.terminal:
                ended.append(event.task_id)
            else:
                self._start(event.task_id)

    def _start(self, task_id: str) -> None:
        if task_id not in self._started:
            self._started.add(task_id)
            self._events.append(Started(task_id=task_id))

    def _look(self, ids: list[str]) -> None:
        """Read the records of tasks, and note what has happened to them."""
        for at in range(0, len(ids), _CHUNK):
            some = ids[at : at + _CHUNK]
            answers = self._lease.ask(functools.partial(_read, some))
            for task_id, (answer, result) in zip(some, answers, strict=True):
                self._note(task_id, some_of(END_FIELDS, answer), result)

    def _note(self, task_id: str, fields: dict[str, str], result: Any) -> None:
        if task_id not in self._running or any(
            isinstance(event, Ended) and event.task_id == task_id for event in self._events
        ):
            return
        if not fields.get("state"):
            since = self._missing.setdefault(task_id, time.monotonic())
            if time.monotonic() - since > LOST_S:
                gone = "its record in Redis is gone"
                self._events.append(Ended(task_id=task_id, ok=False, verdict="supervisor_lost", error=gone))
            return
        self._missing.pop(task_id, None)
        end = end_in(fields)
        if end is None:
            if fields["state"] == "running":
                self._start(task_id)
            return
        self._start(task_id)
        error = None
        if not end.ok:
            error = (end.error or "no reason given") + self._origins.explain(
                self._running[task_id].document, end.worker_id
            )
        found = _result(result) if end.ok else None
        self._origins.learn(found, end.worker_id)
        self._events.append(
            Ended(
                task_id=task_id, ok=end.ok, verdict=end.verdict, error=error, result=found, worker=end.worker_id or None
            )
        )


def _result(data: Any) -> dict[str, Any]:
    """A task's result as Redis has it."""
    if data is None:
        return {"truncated": True}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {"truncated": True}
    return found if isinstance(found, dict) else {"truncated": True}


def _cancelled(task_id: str, why: str) -> Ended:
    return Ended(task_id=task_id, ok=False, verdict="cancelled", error=why)


def _read(ids: list[str]) -> Request[list[tuple[Any, Any]]]:
    commands: list[tuple[Any, ...]] = []
    for task_id in ids:
        commands += [("HMGET", names.record_key(task_id), *END_FIELDS), ("GET", names.result_key(task_id))]
    answers = yield commands
    return list(zip(answers[::2], answers[1::2], strict=True))
