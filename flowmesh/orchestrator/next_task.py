"""Finds out which task of the queue a busy slot would get next, so that it can be prepared. Nothing is taken."""

from __future__ import annotations

import asyncio
import random

from flowmesh.bus.connection import RedisError
from flowmesh.errors import FieldError
from flowmesh.execution.admission import Accepted, accept
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.messages.wire import Recorded
from flowmesh.node.slots import Slot
from flowmesh.orchestrator.claims import Claims
from flowmesh.orchestrator.dispatcher import dispatch_of

PAUSE_S = 2.0, 5.0
"""Between two looks."""
MOST_BYTES = 256 * 1024
"""Of a document; a longer one is left to its task."""


class NextTask:
    def __init__(self, executor: Executor, claims: Claims) -> None:
        self._executor = executor
        self._claims = claims

    async def run(self) -> None:
        """Look until cancelled."""
        ahead = self._executor.parts.ahead
        while True:
            await asyncio.sleep(random.uniform(*PAUSE_S))
            for slot in self._executor.slots.values():
                if self._executor.draining is not None or not ahead.wants(slot):
                    continue
                try:
                    await self._look(slot)
                except (RedisError, OSError, TimeoutError):  # the claims report it
                    break

    async def _look(self, slot: Slot[Run]) -> None:
        ahead = self._executor.parts.ahead
        known = ahead.offered(slot)
        found = await self._claims.peek(slot, known)
        if found is None:
            ahead.offer(slot, None)
        elif found[0] != known:
            ahead.offer(slot, self._accepted(slot.plan.worker_id, *found))

    def _accepted(self, worker_id: str, task_id: str, document: bytes) -> Accepted | None:
        """The task as this node would run it; None where it would refuse it, or its document is long."""
        if len(document) > MOST_BYTES:
            return None
        executor = self._executor
        message = dispatch_of(worker_id, task_id, Recorded(attempt=1), document)
        try:
            return accept(
                message,
                settings=executor.settings,
                catalogue=executor.catalogue,
                results_dir=executor.layout.results_dir,
            )
        except FieldError:
            return None
