"""Runs one FlowMesh task for a workflow engine: queues it once, forwards its log lines, returns its end.

Shared by flowmesh_prefect.py, flowmesh_dagster.py and flowmesh_airflow.py: copy it beside the one that you use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from flowmesh.client import Client, End, TaskExists
from flowmesh.errors import FlowMeshError


class TaskFailed(Exception):
    """A FlowMesh task ended without success.

    Args:
        end: how it ended.
        retry: whether the engine should try again: the failure is retryable, and FlowMesh itself did not retry it.
    """

    def __init__(self, end: End, *, retry: bool) -> None:
        super().__init__(f"{end.task_id} failed on {end.worker_id or 'no worker'} ({end.verdict}): {end.error}")
        self.end = end
        self.retry = retry


def task_id_of(run: str, name: str, document: Mapping[str, Any]) -> str:
    """The same id for the same document, name and run: a run that is started again finds its task.

    Args:
        run: engine and id of its run, such as `prefect-0d5c…`; begins the id.
    """
    content = json.dumps([name, document], sort_keys=True)
    return f"{run}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def run(
    client: Client,
    document: Mapping[str, Any],
    task_id: str,
    say: Callable[[str], object],
    *,
    priority: str = "normal",
    retries: int = 2,
) -> End:
    """Queue a task unless it is there or has succeeded, wait for its end, and forward its log lines meanwhile.

    Args:
        say: is called with each line, in another thread.
        retries: FlowMesh's; 0 leaves them to the engine.

    Raises:
        TaskFailed: it did not succeed.
    """
    state = client.state(task_id)
    if state is None or (state.ended and not state.ok):
        say(f"FlowMesh task {task_id}: queued")
        with contextlib.suppress(TaskExists):  # another process of the same run was first
            client.queue(document, task_id=task_id, priority=priority, retries=retries)
    else:
        say(f"FlowMesh task {task_id}: found, {state.state}")
    end = _follow(client, task_id, say)
    if not end.ok:
        raise TaskFailed(end, retry=end.retryable and retries == 0)
    return end


def _follow(client: Client, task_id: str, say: Callable[[str], object]) -> End:
    over = threading.Event()
    reader: threading.Thread | None = None
    try:
        for event in client.events(task_id):
            if event.type == "ATTEMPT_FAILED":
                say(f"attempt failed on {event.worker_id}: {event.error}")
            if event.type == "TASK_STARTED":
                say(f"runs on {event.worker_id}")
                if reader is not None:
                    reader.join(5)  # that of a node that died does not end: it reads on from the next node
                if reader is None or not reader.is_alive():
                    reader = threading.Thread(target=_forward, args=(client, task_id, say, over), daemon=True)
                    reader.start()
    finally:
        over.set()
    if reader is not None:
        reader.join(10)
    return client.wait(task_id)


def _forward(client: Client, task_id: str, say: Callable[[str], object], over: threading.Event) -> None:
    """Until an attempt's log ends. One that is silent for long is asked for again."""
    silent = True
    while True:
        try:
            for line in client.logs(task_id, follow=True):
                silent = False
                say(line)
            return
        except FlowMeshError as error:
            if not silent:
                say(f"log lines are missing from here: {error}")
            if not silent or over.is_set():
                return
