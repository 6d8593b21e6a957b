"""Drives one pipeline: from its record in Redis to its end, or until another driver has to go on."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from typing import Any

from flowmesh.client import requests
from flowmesh.client.pipelines import classes_of
from flowmesh.client.requests import Request
from flowmesh.errors import FieldError
from flowmesh.pipeline_driver.job import Job
from flowmesh.pipeline_driver.lease import Lease, Lost
from flowmesh.pipeline_driver.origins import Origins
from flowmesh.pipeline_driver.port import QueuePort, Terms
from flowmesh.pipeline_driver.store import RedisStore
from flowmesh.pipelines.document import read
from flowmesh.pipelines.driver import Driver
from flowmesh.pipelines.ports import Task
from flowmesh.pipelines.progress import StageRun
from flowmesh.queue import names, pipeline_scripts
from flowmesh.queue.records import fields_of, some_of
from flowmesh.redaction import Redactor, in_document

_FIELDS = ("message", "generation", "priority", "retries", "anyway", "failures", "started_at")
_POLL_S = 0.5


def drive(job: Job, lease: Lease) -> None:
    """Drive a pipeline to its end.

    Raises:
        Lost, HandedOver: this driver has to end before; another one goes on.
    """
    lease.renew()
    record = lease.ask(lambda: _record(job.pipeline_id))
    if "message" not in record:
        raise Lost("its record is gone")
    document = json.loads(record["message"])
    store = RedisStore(job, lease, Redactor(in_document(document, {})), record.get("started_at", ""))
    if lease.cancelled:
        _abandon(job, lease, store, "cancelled", lease.cancelled)
        return
    if int(record.get("failures", "0")) > pipeline_scripts.MOST_FAILURES:
        why = f"{record['failures']} drivers in a row ended before a stage did; see the logs of their nodes"
        _abandon(job, lease, store, "supervisor_lost", why)
        return
    try:
        pipeline = read(document)
    except FieldError as error:
        _abandon(job, lease, store, "bad_request", str(error))
        return
    plans = lease.ask(lambda: _plans(job.pipeline_id))
    terms = Terms(
        priority=record["priority"],
        retries=int(record["retries"]),
        possible=frozenset(wanted.key for wanted in classes_of(pipeline).values()),
        anyway=record.get("anyway") == "1",
    )
    origins = Origins()
    for kept in store.load().values():
        origins.learn(kept.result, kept.worker)
    stages: dict[str, StageRun] = {}

    def run_of(task: Task, children: tuple[str, ...]) -> str:
        """The same for each driver: from the run of its stage, and what is merged into it."""
        return _digest(stages[task.task_id].run, *plans.pop(task.task_id, (task.task_id, *children)))

    def changed(run: StageRun) -> None:
        for part in run.parts:
            stages[part.task_id] = run
        store.show(run)

    port = QueuePort(job, lease, terms, origins, slots=_slots(lease), run_of=run_of)
    driver = Driver(
        pipeline,
        job.pipeline_id,
        port,
        _Settled(job, lease, store),
        changed=changed,
        tick=lambda: _stop_if_cancelled(lease, driver),
        new_run=lambda run: _digest(record["generation"], run.name, run.key),
        merged=plans,
        local_files=False,
    )
    try:
        driver.run()
    finally:
        port.close()


class _Settled:
    """The store, whose `finish` waits until no task of the pipeline is left anywhere."""

    def __init__(self, job: Job, lease: Lease, store: RedisStore) -> None:
        self._job, self._lease, self._store = job, lease, store
        self.load, self.save = store.load, store.save

    def finish(self, summary: dict[str, Any]) -> None:
        _cancel_tasks(self._job, self._lease)
        self._store.finish(summary)


def _stop_if_cancelled(lease: Lease, driver: Driver) -> None:
    if lease.cancelled and not driver.stopped:
        driver.stop(force=lease.force)
    elif lease.force and not driver.forced:
        driver.stop(force=True)


def _abandon(job: Job, lease: Lease, store: RedisStore, verdict: str, why: str) -> None:
    """End a pipeline whose stages are not looked at."""
    _cancel_tasks(job, lease)
    ends = {
        name: {"state": "succeeded" if kept.ok else "failed", "task_ids": kept.task_ids}
        for name, kept in store.load().items()
    }
    store.end(verdict, why, {"ok": False, "pipeline_id": job.pipeline_id, "error": why, "stages": ends})


def _cancel_tasks(job: Job, lease: Lease) -> None:
    """Cancel the pipeline's tasks that have not ended, and wait for their ends."""
    told: set[tuple[str, bool]] = set()
    while left := lease.ask(lambda: _open_tasks(job.pipeline_id)):
        reason, force = lease.cancelled or "its pipeline has ended", lease.force
        for task_id in left:
            if (task_id, force) not in told:
                told.add((task_id, force))
                lease.ask(functools.partial(requests.cancel, task_id, reason=reason, force=force))
        lease.keep()
        time.sleep(_POLL_S)


def _slots(lease: Lease) -> int:
    living = [worker for worker in lease.ask(requests.workers) if worker.alive]
    slots = int(lease.run(pipeline_scripts.SLOTS, max(1, len(living))))
    if slots < 0:
        raise Lost("another driver has the pipeline")
    return slots


def _record(pipeline_id: str) -> Request[dict[str, str]]:
    (answer,) = yield [("HMGET", names.record_key(pipeline_id), *_FIELDS)]
    return some_of(_FIELDS, answer)


def _plans(pipeline_id: str) -> Request[dict[str, tuple[str, ...]]]:
    (answer,) = yield [("HGETALL", names.pipeline_key(pipeline_id, "tasks"))]
    return {task_id: tuple(json.loads(ids)) for task_id, ids in fields_of(answer).items()}


def _open_tasks(pipeline_id: str) -> Request[list[str]]:
    (answer,) = yield [("HKEYS", names.pipeline_key(pipeline_id, "tasks"))]
    ids = [task_id.decode() for task_id in answer]
    if not ids:
        return []
    states = yield [("HGET", names.record_key(task_id), "state") for task_id in ids]
    return [task_id for task_id, state in zip(ids, states, strict=True) if state not in (None, b"done")]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
