"""A Prefect task that runs a FlowMesh task. Copy it with flowmesh_run.py beside your flows; `REDIS_URL` is the queue's.

@flow(on_cancellation=[cancel_tasks])
def ask() -> Answer:
    return flowmesh_task({"spec": {"taskType": "echo", "message": "hello"}}, Answer)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from flowmesh_run import TaskFailed, run, task_id_of
from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal

from flowmesh.client import Client

T = TypeVar("T")


def _may_retry(_task: Any, _run: Any, state: Any) -> bool:
    """Prefect's own `retries` are spent on what may succeed then; a lost connection, too: the task is found again."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, TaskFailed) or error.retry


@task(retry_condition_fn=_may_retry, cache_policy=NO_CACHE)
def flowmesh_task(
    document: Mapping[str, Any], returns: type[T], *, name: str = "", priority: str = "normal", retries: int = 2
) -> T:
    """Run a FlowMesh task and return its result.

    Args:
        document: with a `spec`.
        returns: what the result is converted to: dict, a dataclass, a TypedDict or a msgspec.Struct.
        name: tells apart tasks with equal documents in one flow run; equal ones are one task.
        retries: FlowMesh's, on another node where one fits. 0: Prefect's (`flowmesh_task.with_options(retries=2)`).

    Raises:
        TaskFailed: has its `end`: verdict, error, worker.
    """
    task_id = task_id_of(f"prefect-{runtime.flow_run.id}", name, document)
    with Client() as client:
        try:
            end = run(client, document, task_id, get_run_logger().info, priority=priority, retries=retries)
        except (KeyboardInterrupt, TerminationSignal):
            client.cancel(task_id, reason="the Prefect flow run was stopped")
            raise
        result = msgspec.convert(client.result(task_id), returns)
    row = {"task": task_id, "worker": end.worker_id, "attempts": end.attempts, "seconds": end.runtime_s}
    create_table_artifact([row], key="flowmesh-task", description="; ".join(end.warnings))
    return result


def cancel_tasks(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001
    """A flow's hook, `on_cancellation`: cancels all its FlowMesh tasks, also those in threads (`submit`, `map`)."""
    with Client() as client:
        for each in client.tasks():
            if each.task_id.startswith(f"prefect-{flow_run.id}-"):
                client.cancel(each.task_id, reason="the Prefect flow run was cancelled")
