"""Tells clients in Redis where running tasks serve models, and with which key."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.messages.serving import Served
from flowmesh.queue.names import endpoint_key, record_key
from flowmesh.queue.records import text
from flowmesh.tasks.verdicts import Verdict

RENEW_S = 5.0
KEPT_S = 30
"""How long a hash outlives its node."""


class Endpoints(Observer):
    """Keeps one hash for each running task that serves a model; adds itself to the executor's observers.

    Redis may lose a hash, and be away: each turn writes all of them again.
    """

    def __init__(self, executor: Executor, client: redis.Redis) -> None:
        self._runs = executor.runs
        self._client = client
        self._changed = asyncio.Event()
        self._written: dict[str, str] = {}
        """By task, the worker whose hash it is."""
        self._failed = False
        executor.observers.add(self)
        executor.parts.served.add(self.served)

    def on_endpoint(self, run: Run) -> None:  # noqa: ARG002 - the observer's signature
        self._changed.set()

    def on_ended(self, run: Run, verdict: Verdict) -> None:  # noqa: ARG002 - the observer's signature
        if run.task_id in self._written:
            self._changed.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._write()
                self._failed = False
            except (RedisError, OSError, TimeoutError) as error:
                if not self._failed:
                    logger.warning("addresses of served models not written: {}", error)
                self._failed = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._changed.wait()

    async def served(self, task_id: str) -> Served | str | None:
        """Where a task serves a model by what Redis has; a text: why it does not any more; None: not known."""
        try:
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.hmget(endpoint_key(task_id), "base_url", "model", "api_key")
                pipeline.hmget(record_key(task_id), "state", "verdict", "error")
                found, ended = await pipeline.execute()
        except (RedisError, OSError, TimeoutError):
            return None  # asked again; others report it
        base_url, model, api_key = map(text, found)
        if base_url and api_key:
            return Served(task_id=task_id, base_url=base_url, model=model, api_key=api_key)
        state, verdict, error = map(text, ended)
        return f"it has ended ({verdict or 'ok'}{': ' if error else ''}{error})" if state == "done" else None

    async def remove_all(self) -> None:
        """Remove what is left; the node ends, or another one takes its place and writes them again."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            for task_id in list(self._written):
                await self._remove(task_id)

    async def _write(self) -> None:
        serving = {run.task_id: run for run in self._runs if run.endpoint is not None}
        for task_id, run in serving.items():
            assert run.serving is not None, "it has an endpoint"
            fields: dict[Any, Any] = {
                "base_url": run.serving.base_url,
                "model": run.serving.model,
                "api_key": run.serving.api_key,
                "worker_id": run.worker_id,
            }
            self._written[task_id] = run.worker_id
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.hset(endpoint_key(task_id), mapping=fields)
                pipeline.expire(endpoint_key(task_id), KEPT_S)
                await pipeline.execute()
        for task_id in [task_id for task_id in self._written if task_id not in serving]:
            await self._remove(task_id)

    async def _remove(self, task_id: str) -> None:
        """Unless another node serves the task by now."""
        key = endpoint_key(task_id)
        owner = await self._client.hget(key, "worker_id")
        if owner is not None and text(owner) == self._written[task_id]:
            await self._client.delete(key)
        del self._written[task_id]
