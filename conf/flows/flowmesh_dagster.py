"""Runs a FlowMesh task in a Dagster op or asset. Copy it with flowmesh_run.py; `REDIS_URL` is the queue's.

@dg.asset
def answer(context: dg.AssetExecutionContext) -> dg.Output[dict]:
    return run_task(context, {"spec": {"taskType": "echo", "message": "hello"}}, dict)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import dagster as dg
import msgspec
from flowmesh_run import TaskFailed, run, task_id_of

from flowmesh.client import Client

T = TypeVar("T")


def run_task(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    document: Mapping[str, Any],
    returns: type[T],
    *,
    priority: str = "normal",
    retries: int = 2,
) -> dg.Output[T]:
    """Run a FlowMesh task; its result is the output, with the evidence as metadata.

    Args:
        document: with a `spec`.
        returns: what the result is converted to: dict, a dataclass, a TypedDict or a msgspec.Struct.
        retries: FlowMesh's, on another node where one fits. 0: the op's RetryPolicy is used.

    Raises:
        dagster.Failure: it did not succeed; its metadata has verdict, worker and attempts.
    """
    name = f"{context.op_handle}[{context.get_mapping_key() or ''}]"
    task_id = task_id_of(f"dagster-{_first_run(context)}", name, document)
    with Client() as client:
        try:
            end = run(client, document, task_id, context.log.info, priority=priority, retries=retries)
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            client.cancel(task_id, reason="the Dagster run was stopped")
            raise
        except TaskFailed as error:
            metadata = {"task": task_id, "verdict": error.end.verdict, "worker": error.end.worker_id}
            raise dg.Failure(str(error), metadata=metadata, allow_retries=error.retry) from error
        result = msgspec.convert(client.result(task_id), returns)
    metadata = {"task": task_id, "worker": end.worker_id, "attempts": end.attempts, "seconds": end.runtime_s or 0.0}
    return dg.Output(result, metadata=metadata)


def _first_run(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> str:
    """The run that this one goes on with after a failure ("from failure"), over all such runs; else this one."""
    each = context.run
    while each.parent_run_id and not {"dagster/is_resume_retry", "dagster/is_asset_resume_retry"}.isdisjoint(each.tags):
        parent = context.instance.get_run_by_id(each.parent_run_id)
        if parent is None:
            break
        each = parent
    return str(each.run_id)
