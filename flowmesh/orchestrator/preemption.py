"""Makes room for queued tasks of high priority: a training task of low priority saves a checkpoint and goes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.scripts import run_script
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.orchestrator.claims import Claims
from flowmesh.queue import names, scripts
from flowmesh.queue.classes import parse
from flowmesh.queue.names import Priority
from flowmesh.queue.reports import PREEMPTED
from flowmesh.tasks import machine
from flowmesh.tasks.catalogue import saves_checkpoints
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Stop

LOOK_S = 15.0
"""Between two looks while such a task runs here and nothing was announced."""
IDLE_FIRST_S = 1.0
"""How long an idle slot elsewhere has for the entry first."""


class Preemption:
    def __init__(self, executor: Executor, claims: Claims, client: redis.Redis) -> None:
        self._executor = executor
        self._claims = claims
        self._client = client
        self._urgent = asyncio.Event()

    def on_urgent(self) -> None:
        """An entry of high priority was added somewhere."""
        self._urgent.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S * random.uniform(0.7, 1.3)):
                    await self._urgent.wait()
            self._urgent.clear()
            if not self._candidates():
                continue
            await asyncio.sleep(IDLE_FIRST_S * random.uniform(1, 2))
            with contextlib.suppress(RedisError, OSError, TimeoutError):  # the claims report it
                await self._make_room()

    def _candidates(self) -> list[Run]:
        """Running tasks that may make room: queued with low priority, and able to go on from a checkpoint."""
        if self._executor.draining is not None:
            return []
        return [
            run
            for run in self._executor.runs
            if run.task.state is State.RUNNING and run.recorded is not None
            if run.recorded.priority == Priority.LOW and saves_checkpoints(run.accepted.type.name)
        ]

    async def _make_room(self) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zrange(names.CLASSES, 0, -1)
            pipeline.hgetall(names.WAITING)
            answers: list[Any] = await pipeline.execute()
        members, waiting = answers
        for member in members:
            wanted = parse(member.decode(errors="replace"))
            if wanted is None or f"{wanted.key}:{Priority.HIGH}".encode() not in waiting:
                continue
            for run in self._candidates():
                slot = run.slot
                if slot.trouble or slot.queue or not self._claims.fits(slot, wanted):
                    continue
                if not await run_script(self._client, scripts.PREEMPT, wanted.key):
                    break
                if run in self._candidates():
                    logger.bind(task=run.task_id).info("makes room for a task of high priority")
                    detail = f"{PREEMPTED}: a task of high priority waits; it goes on from its checkpoint"
                    self._executor.apply(run, machine.StopRequested(Stop.DRAIN, detail, checkpoint=True))
