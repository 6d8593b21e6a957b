"""Names of the queue's keys and of its channel; docs/contract.md describes each."""

from __future__ import annotations

import enum

PREFIX = "flowmesh:"
CHANNEL = "flowmesh.queue"
"""New classes, failed attempts, urgent entries, and requests for logs."""
CONTROL_CHANNEL = "flowmesh.control"
"""Cancels; see orchestrator.control_channel."""
GROUP = "flowmesh"
"""The consumer group of each stream."""
CLASSES = f"{PREFIX}queue:classes"
"""Sorted set: the requirement classes in use, each as canonical JSON, by when an entry was last added."""
WAITING = f"{PREFIX}queue:waiting"
"""Hash: `<class>:<priority>` → how many entries wait."""
HOLDERS = f"{PREFIX}queue:holders"
"""Set: the workers that hold tasks of the queue."""
SWEEPER = f"{PREFIX}queue:sweeper"
"""Lock: the node that looks for dead workers now."""
OPEN = f"{PREFIX}tasks:open"
DONE = f"{PREFIX}tasks:done"
"""Sorted sets of task ids, by when they were queued and by when they ended, in milliseconds."""

PIPELINES = f"{PREFIX}pipelines"
"""Sorted set: pipelines that have not ended, by when they were submitted, in milliseconds."""

GANGS = f"{PREFIX}queue:gangs"
"""Sorted set: tasks on several nodes that wait, by priority, what came back, and age."""

GONE = f"{PREFIX}queue:gone"
"""Hash: a holder without heartbeat → since when, in milliseconds."""


class Priority(enum.StrEnum):
    """Of a queued task, most urgent first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


def wake_key(class_key: str) -> str:
    """List with one token while entries of a class wait: idle nodes block on it, and one at a time is woken."""
    return f"{PREFIX}queue:c:{class_key}:wake"


def held_key(worker_id: str) -> str:
    """Hash: the tasks that a worker holds → the number of the attempt."""
    return f"{PREFIX}queue:held:{worker_id}"


def record_key(task_id: str) -> str:
    return f"{PREFIX}task:{task_id}"


def result_key(task_id: str) -> str:
    return f"{PREFIX}result:{task_id}"


def endpoint_key(task_id: str) -> str:
    """Hash: where a running task serves a model, and its key. Expires soon after its node is gone."""
    return f"{PREFIX}endpoint:{task_id}"


def attempts_key(task_id: str) -> str:
    """List: what is known of each attempt that has ended, as JSON."""
    return f"{PREFIX}attempts:{task_id}"


def logs_key(token: str) -> str:
    """Stream of log lines for one follower, which its request names by a token."""
    return f"{PREFIX}logs:{token}"


def follow_key(token: str) -> str:
    """Exists while the follower is there."""
    return f"{PREFIX}follow:{token}"


def pipeline_key(pipeline_id: str, part: str) -> str:
    """A part of a pipeline.

    Args:
        part: `driver` (its lease), `ends` (hash: stage → its kept end), `stages` (hash: stage → where it stands),
            `tasks` (hash: task → the ids that it runs) or `log` (stream).
    """
    return f"{PREFIX}pipeline:{pipeline_id}:{part}"
