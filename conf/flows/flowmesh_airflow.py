"""An Airflow operator that runs a FlowMesh task. Copy it with flowmesh_run.py beside your DAGs; `REDIS_URL`: the queue.

with DAG("ask"):
    FlowMeshOperator(task_id="ask", document={"spec": {"taskType": "echo", "message": "hello"}})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowFailException
from flowmesh_run import TaskFailed, run, task_id_of

from flowmesh.client import Client


class FlowMeshOperator(BaseOperator):
    """Run a FlowMesh task; its result, of JSON's types, is the return value (XCom).

    Args:
        document: with a `spec`. Templated: `{{ ds }}`, another task's `.output`. airflow.sdk's `literal` stops it.
        returns: what the result has to fit: dict, a dataclass, a TypedDict or a msgspec.Struct.
        flowmesh_retries: FlowMesh's, on another node where one fits. 0: Airflow's `retries`.

    Raises:
        AirflowFailException: it did not succeed, or its result does not fit; Airflow does not retry.
        TaskFailed: it did not succeed; Airflow retries.
    """

    template_fields = ("document",)

    def __init__(
        self,
        *,
        document: Mapping[str, Any],
        returns: type = dict,
        priority: str = "normal",
        flowmesh_retries: int = 2,
        **operator: Any,
    ) -> None:
        super().__init__(**operator)
        self.document = document
        self.returns = returns
        self.priority = priority
        self.flowmesh_retries = flowmesh_retries
        self._queued = ""  # the FlowMesh task's id

    def execute(self, context: Context) -> Any:
        ti = context["ti"]
        name = f"{ti.dag_id} {ti.run_id} {ti.task_id}[{ti.map_index}]"
        task_id = self._queued = task_id_of("airflow", name, self.document)
        with Client() as client:
            try:
                end = run(
                    client, self.document, task_id, self.log.info, priority=self.priority, retries=self.flowmesh_retries
                )
                result = msgspec.convert(client.result(task_id), self.returns)
            except KeyboardInterrupt:  # in dag.test
                self.on_kill()
                raise
            except TaskFailed as error:
                if error.retry:
                    raise
                raise AirflowFailException(str(error)) from error
            except msgspec.ValidationError as error:
                raise AirflowFailException(f"the result of {task_id} does not fit `returns`: {error}") from error
        self.log.info("FlowMesh task %s: done on %s, attempts: %s", task_id, end.worker_id, end.attempts)
        return msgspec.to_builtins(result, str_keys=True)

    def on_kill(self) -> None:
        """On SIGTERM, which is how Airflow stops a task, and after `execution_timeout`. `execute` then sees the end."""
        if self._queued:
            with Client() as client:  # its own: that of `execute` is in use
                client.cancel(self._queued, reason="the Airflow task was stopped")
