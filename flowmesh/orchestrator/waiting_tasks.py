"""Gives back a task that waits behind a running one for long, while another worker that could run it is idle.

It fails as `node_fault` before it has started, so that the orchestrator gives it to another worker. To unregister would
have it queue the running task again, too. Each task goes back once at most: the orchestrator's attempts are few.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import msgspec
from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.errors import FieldError
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.messages.matching import match
from flowmesh.messages.wire import DISABLED, WORKER_IDS, heartbeat_key, worker_key
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Stop

LONGEST_PAUSE_S = 10.0
REMEMBERED = 1000


class _Env(msgspec.Struct):
    task_types: list[str] | None = None


class WaitingTasks:
    """
    Args:
        after_s: how long a task waits first (`tasks.return_waiting_after_s`).
    """

    def __init__(self, executor: Executor, client: redis.Redis, after_s: float) -> None:
        self._executor = executor
        self._client = client
        self._after_s = after_s
        self._pause_s = min(LONGEST_PAUSE_S, after_s / 2)
        self._returned: deque[str] = deque(maxlen=REMEMBERED)
        self._seen: dict[int, str] = {}
        """By attempt: the idle worker that the last look found for it."""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s)
            waiting = self._waiting()
            try:
                idle = await self._idle_workers() if waiting else []
            except (RedisError, OSError, TimeoutError):  # others report it
                continue
            self._give_back(waiting, idle)

    def _waiting(self) -> list[Run]:
        """Tasks that have waited for long behind another one, and did not go back before."""
        if self._executor.draining is not None:
            return []
        return [
            run
            for slot in self._executor.slots.values()
            if slot.current is not None
            for run in slot.queue
            if time.monotonic() - run.queued_at > self._after_s and run.task_id not in self._returned
        ]

    async def _idle_workers(self) -> list[dict[str, Any]]:
        """Workers of other slots and nodes that the orchestrator may dispatch to."""
        members: set[bytes] = await self._client.smembers(WORKER_IDS)  # type: ignore[assignment]
        ids = sorted(worker.decode(errors="replace") for worker in members)
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.smembers(DISABLED)
            for worker_id in ids:
                pipeline.hmget(worker_key(worker_id), "status", "env_json", "hardware_json")
                pipeline.ttl(heartbeat_key(worker_id))
            disabled, *answers = await pipeline.execute()
        found = []
        for index, worker_id in enumerate(ids):
            (status, env, hardware), ttl = answers[2 * index : 2 * index + 2]
            if status == b"IDLE" and ttl > 0 and worker_id.encode() not in disabled:
                found.append({"id": worker_id, "env": env, "hardware": hardware})
        return found

    def _give_back(self, waiting: list[Run], idle: list[dict[str, Any]]) -> None:
        seen: dict[int, str] = {}
        for run in waiting:
            if (worker := next((each["id"] for each in idle if _fits(run, each)), None)) is None:
                continue
            idle = [each for each in idle if each["id"] != worker]  # one task for each
            if self._seen.get(run.attempt) is None or run not in run.slot.queue or run.slot.current is None:
                seen[run.attempt] = worker  # perhaps a task is on its way to that worker: look once more
                continue
            self._returned.append(run.task_id)
            waited_s = time.monotonic() - run.queued_at
            why = (
                f"not started: it waited {waited_s:.0f} s behind {run.slot.current.task_id}, and {worker} could run it"
            )
            logger.bind(task=run.task_id).info("task given back: {}", why)
            self._executor.apply(run, machine.StopRequested(Stop.NODE_FAULT, why))
        self._seen = seen


def _fits(run: Run, worker: dict[str, Any]) -> bool:
    """Whether a worker may run a task, as far as it says what it has."""
    if worker["id"] == run.worker_id:
        return False
    resources = run.accepted.task.get("spec", {}).get("resources") or {}
    try:
        types = msgspec.json.decode(worker["env"] or b"{}", type=_Env).task_types
        hardware = msgspec.json.decode(worker["hardware"] or b"{}", type=dict[str, Any])
        return (types is None or run.accepted.type.name in types) and not match(
            hardware, resources.get("hardware") or {}
        )
    except (msgspec.DecodeError, UnicodeDecodeError, FieldError, AttributeError, TypeError):
        return False
