"""What clients ask of Redis about pipelines: documents of several stages, which a node drives."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from flowmesh.client.requests import Request, Task, TaskExists, check_queueing, workers
from flowmesh.client.shapes import checked, encoded, id_or_new, name_of
from flowmesh.errors import FieldError
from flowmesh.messages import wire
from flowmesh.pipelines.document import Pipeline, is_pipeline, read
from flowmesh.queue import names, pipeline_scripts
from flowmesh.queue.classes import RequirementClass, class_of, owner_of
from flowmesh.queue.records import TaskState, fields_of, text
from flowmesh.queue.workers import NeverFits, refuse_unless_possible

__all__ = ["LONGEST_ID", "StageState", "classes_of", "is_one", "is_pipeline", "refuse_worker", "stages", "submit"]

LONGEST_ID = 120
"""Of a pipeline: the ids of its tasks begin with it."""


class StageState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stage of a submitted pipeline stands."""

    state: str
    """As docs/pipelines.md has it; `waiting` and `ready` of a stage that has no task yet."""
    task_ids: tuple[str, ...] = ()
    merged_into: str | None = None
    """The stage whose task runs it."""
    worker: str | None = None
    started: float | None = None
    """Seconds since the epoch."""
    seconds: float | None = None
    error: str | None = None
    verdict: str | None = None


def submit(
    document: Mapping[str, Any],
    *,
    priority: str = "normal",
    retries: int = 2,
    task_id: str | None = None,
    anyway: bool = False,
) -> Request[Task]:
    """Add a pipeline; one of the nodes drives it.

    Raises:
        FieldError: the document cannot be used, with all that is wrong with its stages.
        NeverFits: no registered worker could ever run a stage; names it.
        TaskExists: a pipeline of this id has not ended.
    """
    check_queueing(document, priority, retries)
    pipeline = read(json.loads(encoded(document)))
    task_id = id_or_new(task_id)
    if len(task_id) > LONGEST_ID:
        raise FieldError(f"a pipeline's id has at most {LONGEST_ID} characters (found {len(task_id)})", "task_id")
    if not anyway:
        yield from _refuse_unless_possible(pipeline)
    arguments = (
        task_id, wire.utc_now(), priority, owner_of(document), retries, encoded(document), name_of(document),
        secrets.token_hex(8), int(anyway),
    )  # fmt: skip
    (answer,) = yield [(pipeline_scripts.SUBMIT, *arguments)]
    if text(answer) == "exists":
        raise TaskExists(f"{task_id}: a task of this id has not ended; choose another one, or wait for it")
    return Task(task_id=task_id)


def is_one(state: TaskState | None) -> bool:
    """Whether a record is a pipeline's."""
    return state is not None and state.task_type == pipeline_scripts.TYPE


def refuse_worker(worker: str | None) -> None:
    """Raises FieldError where a pipeline is meant for one worker."""
    if worker is not None:
        raise FieldError("worker: a pipeline goes to no single worker: its stages run on those that fit", "worker")


def classes_of(pipeline: Pipeline) -> dict[str, RequirementClass]:
    """By stage: its requirement class; without those whose type or needs depend on other stages' results.

    Raises:
        FieldError: what a stage needs cannot be read; names the stage.
    """
    found = {}
    for stage in pipeline.stages:
        needs = {"taskType": stage.spec.get("taskType"), "resources": stage.spec.get("resources")}
        if "${" in json.dumps(needs):
            continue
        try:
            found[stage.name] = class_of({"spec": needs})
        except FieldError as error:
            raise FieldError(f"{stage.entry.where}: {error}", stage.entry.where) from None
    return found


def _refuse_unless_possible(pipeline: Pipeline) -> Request[None]:
    registered = yield from workers()
    checked_keys = set()
    for name, wanted in classes_of(pipeline).items():
        if wanted.key not in checked_keys:
            refuse_unless_possible(registered, wanted, f"the stage {name!r}")
            checked_keys.add(wanted.key)
    living = [worker for worker in registered if worker.alive]
    if not any(worker.drives_pipelines for worker in living):
        why = "its node drives no pipelines: it is older, or has queue.pipelines = 0"
        raise NeverFits({worker.worker_id: why for worker in living}, "this pipeline")


def stages(task_id: str) -> Request[dict[str, StageState]]:
    """By stage: where it stands; without those that have not begun."""
    checked(task_id)
    (answer,) = yield [("HGETALL", names.pipeline_key(task_id, "stages"))]
    found = {}
    for name, value in fields_of(answer).items():
        try:
            found[name] = msgspec.json.decode(value, type=StageState)
        except msgspec.DecodeError:
            continue  # of another version
    return found
