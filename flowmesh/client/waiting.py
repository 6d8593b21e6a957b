"""What clients ask of Redis about tasks that wait in the queue: how many, which, in which order; and to remove one."""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.client.requests import Request
from flowmesh.client.shapes import checked
from flowmesh.errors import FieldError
from flowmesh.messages import wire
from flowmesh.queue import names, waiting_scripts
from flowmesh.queue.classes import RequirementClass, parse
from flowmesh.queue.names import Priority
from flowmesh.queue.records import FIELDS, fields_of, some_of, state_of, text

MOST = 1000
"""Entries that one request lists."""
SHORTEST_KEY = 4
"""Characters of a class's key that name it."""
_FIELDS = (*FIELDS, "pipeline")
_GANG_FIELDS = (*_FIELDS, "class_json")


class WaitingTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that waits, and its place. More urgent tasks that come later, and tasks that come back, go before it."""

    task_id: str
    position: int
    """In its class, from 1: as workers take from this class if nothing is added. Of a pipeline: among pipelines."""
    class_key: str
    """Of its requirement class; empty: a pipeline that waits for a driver."""
    requires: dict[str, Any] = {}
    """What its class asks for, as `Client.waiting` has it."""
    task_type: str = ""
    name: str = ""
    owner: str = ""
    priority: str = ""
    came_back: bool = False
    """Whether it is at the front of its priority: an attempt failed, its node drained or died, or it made room."""
    queued_at: str = ""
    attempts: int = 0
    """How often a worker had it."""
    failures: int = 0
    """Of these attempts; `retries` are allowed."""
    retries: int = 0
    pipeline: str = ""
    """The pipeline that it belongs to."""
    nodes: str = ""
    """Of a task on several nodes, how many it asks for (`2`, `2-4`): its position is among those that fit its class."""
    stage: str = ""
    """Its stage there, with the number of the shard if it is one: `train`, `ask.s2`."""


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What came of removing a task from the queue."""

    task_id: str
    removed: bool
    state: str
    """That it was in: `queued` (removed), `claimed`, `running`, `dispatched`, `done`, or `unknown`."""
    worker_id: str = ""
    """Who has or had it, where it was not removed."""


def counts() -> Request[list[dict[str, Any]]]:
    """The classes with entries that wait: key, what each asks for, and how many of each priority.

    A task on several nodes counts once for each node that it needs at least.
    """
    found = {wanted.key: (wanted, numbers) for wanted, numbers in (yield from _classes())}
    for wanted, task in (yield from _gangs()):
        _, numbers = found.setdefault(wanted.key, (wanted, {each.value: 0 for each in Priority}))
        numbers[task.priority] += int(task.nodes.partition("-")[0])
    return [
        {"class": wanted.key, "requires": msgspec.to_builtins(wanted), "waiting": numbers}
        for wanted, numbers in found.values()
    ]


def _classes() -> Request[list[tuple[RequirementClass, dict[str, int]]]]:
    members, answer = yield [("ZRANGE", names.CLASSES, 0, -1), ("HGETALL", names.WAITING)]
    waiting = fields_of(answer)
    found = []
    for member in members:
        wanted = parse(text(member))
        if wanted is None:
            continue
        numbers = {each.value: int(waiting.get(f"{wanted.key}:{each.value}", 0)) for each in Priority}
        if any(numbers.values()):
            found.append((wanted, numbers))
    return found


def _gangs() -> Request[list[tuple[RequirementClass, WaitingTask]]]:
    """Tasks on several nodes that wait, in order, each with its class."""
    (answer,) = yield [("ZRANGE", names.GANGS, 0, MOST - 1)]
    ids = [text(each) for each in answer]
    answers = (yield [("HMGET", names.record_key(task_id), *_GANG_FIELDS) for task_id in ids]) if ids else []
    found: list[tuple[RequirementClass, WaitingTask]] = []
    places: dict[str, int] = {}
    for task_id, fields in zip(ids, (some_of(_GANG_FIELDS, each) for each in answers), strict=True):
        wanted = parse(fields.get("class_json", ""))
        if wanted is None:
            continue
        places[wanted.key] = place = places.get(wanted.key, 0) + 1
        if (task := _task(task_id, fields, place, wanted, came_back=False)) is not None:
            found.append((wanted, task))
    return found


def tasks(*, owner: str | None = None, task_class: str | None = None, limit: int = 100) -> Request[list[WaitingTask]]:
    """The tasks that wait.

    Args:
        owner: only this one's; None: all.
        task_class: a task type, or the beginning of a class's key; None: all classes, and pipelines.
        limit: from 1 to MOST.

    Raises:
        FieldError: names the argument.
    """
    if not isinstance(limit, int) or not 1 <= limit <= MOST:
        raise FieldError(f"limit: expected a number from 1 to {MOST}, found {limit!r}", "limit")
    found: list[WaitingTask] = []
    for wanted, numbers in (yield from _classes()):
        if task_class is not None and not _is_class(wanted, task_class):
            continue
        before = 0
        for priority, number in numbers.items():
            if number > 0 and len(found) < limit:
                found += yield from _lane(wanted, priority, before, owner, limit - len(found))
            before += number
    for wanted, task in (yield from _gangs()):
        if (task_class is None or _is_class(wanted, task_class)) and owner in (None, task.owner):
            found.append(task)
    del found[limit:]
    if task_class in (None, "pipeline") and len(found) < limit:
        found += (yield from _pipelines(owner))[: limit - len(found)]
    return found


def _is_class(wanted: RequirementClass, name: str) -> bool:
    return wanted.task_type == name or (len(name) >= SHORTEST_KEY and wanted.key.startswith(name))


def _lane(
    wanted: RequirementClass, priority: str, before: int, owner: str | None, limit: int
) -> Request[list[WaitingTask]]:
    """The entries of one class and priority.

    Args:
        before: how many more urgent ones the class has.
    """
    (entries,) = yield [(waiting_scripts.LOOK, wanted.key, priority, limit, int(owner is not None), owner or "")]
    if not entries:
        return []
    ids = [text(task_id) for _, task_id, _ in entries]
    answers = yield [("HMGET", names.record_key(task_id), *_FIELDS) for task_id in ids]
    found = []
    for task_id, (position, _, place), answer in zip(ids, entries, answers, strict=True):
        task = _task(task_id, some_of(_FIELDS, answer), before + int(position), wanted, came_back=place == b"front")
        if task is not None:
            found.append(task)
    return found


def _pipelines(owner: str | None) -> Request[list[WaitingTask]]:
    """The first pipelines that wait for a driver."""
    (answer,) = yield [("ZRANGE", names.PIPELINES, 0, MOST - 1)]
    ids = [text(each) for each in answer]
    if not ids:
        return []
    answers = yield [("HMGET", names.record_key(task_id), *_FIELDS) for task_id in ids]
    found: list[WaitingTask] = []
    for task_id, fields in zip(ids, (some_of(_FIELDS, each) for each in answers), strict=True):
        task = _task(task_id, fields, len(found) + 1, None, came_back=False)
        if task is not None:
            found.append(task)
    return [task for task in found if owner is None or task.owner == owner]


def _task(
    task_id: str, fields: dict[str, str], position: int, wanted: RequirementClass | None, *, came_back: bool
) -> WaitingTask | None:
    state = state_of(task_id, fields)
    if state is None or state.state != "queued":
        return None  # it was taken or has ended meanwhile
    pipeline = fields.get("pipeline", "")
    return WaitingTask(
        task_id=task_id,
        position=position,
        class_key="" if wanted is None else wanted.key,
        requires={} if wanted is None else msgspec.to_builtins(wanted),
        task_type=state.task_type,
        name=state.name,
        owner=state.owner,
        priority=state.priority,
        came_back=came_back,
        queued_at=state.queued_at,
        attempts=state.attempt,
        failures=state.failures,
        retries=state.retries,
        nodes=state.nodes,
        pipeline=pipeline,
        stage=task_id.removeprefix(f"{pipeline}.") if pipeline else "",
    )


def remove(task_id: str, *, reason: str = "removed from the queue") -> Request[Removal]:
    """Take a task out of the queue if it waits."""
    checked(task_id)
    reason = reason[:200] or "removed from the queue"
    (answer,) = yield [(waiting_scripts.REMOVE, task_id, wire.utc_now(), reason)]
    state, worker_id = map(text, answer)
    return Removal(task_id=task_id, removed=state == "queued", state=state, worker_id=worker_id)
