"""Airflow DAGs of the tests, run one after another by `dag.test`, beside copies of conf/flows.

In one process, as `dag.test` makes the task API first, which takes ten seconds.
"""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from airflow.sdk import DAG
from airflow.utils import db
from flowmesh_airflow import FlowMeshOperator


@dataclasses.dataclass
class Answer:
    result: int


def python(code: str, **inputs: Any) -> dict[str, Any]:
    return {"spec": {"taskType": "python", "code": code, "inputs": inputs}}


HERE = Path(__file__).parent
SHORT = "open(inputs['path'], 'a').write('x')\nprint('a line')\nresult = int(inputs['n'])"
DIES_ONCE = """
import os, pathlib
path = pathlib.Path(inputs["path"])
first = not path.exists()
path.open("a").write("x")
if first:
    os.kill(os.getpid(), 9)
result = 8
"""
FAILS = "open(inputs['path'], 'a').write('x')\nraise ValueError('not today')"
OURS = {"flowmesh_retries": 0, "retries": 2, "retry_delay": datetime.timedelta(0)}
WHEN = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
"""The same date is the same run."""

with DAG("several") as several:
    FlowMeshOperator(
        task_id="short", document=python(SHORT, path=str(HERE / "airflow-once"), n="{{ 2 * 3 }}"), returns=Answer
    )
    FlowMeshOperator(task_id="again", document=python(DIES_ONCE, path=str(HERE / "airflow-dies")), **OURS)
    FlowMeshOperator(task_id="failed", document=python(FAILS, path=str(HERE / "airflow-fails")), **OURS)

with DAG("long") as long:
    FlowMeshOperator(task_id="wait", document={"spec": {"taskType": "echo", "delaySec": 600}}, retries=2)


def run(dag: DAG, but: str | None = None) -> None:
    done = dag.test(logical_date=WHEN, run_after=WHEN, mark_success_pattern=but).get_task_instances()
    value = lambda ti: ti.xcom_pull(ti.task_id, map_indexes=ti.map_index)  # noqa: E731
    print(json.dumps({f"{ti.task_id}[{ti.map_index}]": [ti.state, ti.try_number, value(ti)] for ti in done}))


if __name__ == "__main__":
    db.upgradedb()
    run(several)
    run(several, but="again|failed")
    run(long)
