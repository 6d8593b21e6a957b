"""The client of a deployment: submit and queue tasks, wait for them, read results and logs. Needs Redis and no node.

from flowmesh.client import Client

with Client("redis://10.0.0.1") as client:
    task = client.queue({"spec": {"taskType": "echo", "message": "hello"}})
    end = client.wait(task.task_id)
    print(end.verdict, client.result(task.task_id))
"""

from flowmesh.client.async_client import AsyncClient
from flowmesh.client.client import Client
from flowmesh.client.pipelines import StageState
from flowmesh.client.requests import Endpoint, NoEndpoint, NoResult, Task, TaskExists, UnknownTask, WorkerGone
from flowmesh.client.waiting import Removal, WaitingTask
from flowmesh.queue.records import Attempt, End, Event, TaskState
from flowmesh.queue.workers import NeverFits, NoWorkerFits, Worker

__all__ = [
    "AsyncClient",
    "Attempt",
    "Client",
    "End",
    "Endpoint",
    "Event",
    "NeverFits",
    "NoEndpoint",
    "NoResult",
    "NoWorkerFits",
    "Removal",
    "StageState",
    "Task",
    "TaskExists",
    "TaskState",
    "UnknownTask",
    "WaitingTask",
    "Worker",
    "WorkerGone",
]
