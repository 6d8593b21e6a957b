"""Prefect flows of the tests, run in processes of their own beside copies of conf/flows."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from flowmesh_prefect import cancel_tasks, flowmesh_task
from flowmesh_run import TaskFailed
from prefect import flow, runtime

from flowmesh.client import Client


@dataclasses.dataclass
class Answer:
    result: dict[str, int]


def python(code: str, **inputs: Any) -> dict[str, Any]:
    return {"spec": {"taskType": "python", "code": code, "inputs": inputs}}


LONG = {"spec": {"taskType": "echo", "delaySec": 600}}
SHORT = "print('a line')\nopen(inputs['path'], 'a').write('x')\nresult = {'number': 6}"
DIES_ONCE = """
import os, pathlib
path = pathlib.Path(inputs["path"])
first = not path.exists()
path.open("a").write("x")
if first:
    os.kill(os.getpid(), 9)
result = {"number": 8}
"""
FAILS = "open(inputs['path'], 'a').write('x')\nraise ValueError('not today')"


@flow
def several() -> None:
    short = python(SHORT, path=str(Path("once").resolve()))
    found: dict[str, Any] = {"short": flowmesh_task(short, Answer).result, "same": flowmesh_task(short, Answer).result}
    ours = flowmesh_task.with_options(retries=2)
    found["again"] = ours(python(DIES_ONCE, path=str(Path("dies").resolve())), Answer, retries=0).result
    try:
        ours(python(FAILS, path=str(Path("fails").resolve())), Answer, retries=0)
    except TaskFailed as error:
        found["failed"] = [error.end.verdict, str(error)]
    with Client() as client:
        left = client.queue(LONG, task_id=f"prefect-{runtime.flow_run.id}-left").task_id
        other = client.queue(LONG).task_id
        cancel_tasks(flow=several, flow_run=runtime.flow_run, state=None)
        found["left"] = client.wait(left).verdict
        found["other"] = client.cancel(other)
        client.wait(other)
    print(json.dumps(found))


@flow(on_cancellation=[cancel_tasks])
def direct() -> dict[str, int]:
    return flowmesh_task(LONG, Answer).result


@flow(on_cancellation=[cancel_tasks])
def in_threads() -> dict[str, int]:
    return flowmesh_task.submit(LONG, Answer).result().result


if __name__ == "__main__":
    globals()[sys.argv[1]]()
