"""Returns what dead workers hold to the queue. Any living node does it, one at a time.

A worker is dead when its heartbeat key has been gone for `queue.take_over_after_s`. One that comes back with a task of
which another attempt has begun finds its report dropped: the attempt's number is the fence.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.scripts import run_script
from flowmesh.messages.wire import heartbeat_key, utc_now
from flowmesh.orchestrator.gang_members import silence_ms
from flowmesh.queue import gang_scripts, names, scripts

PAUSE_S = 10.0
"""Between two looks of one node, about; shorter where workers are taken over sooner."""


class TakeOver:
    """
    Args:
        after_s: `queue.take_over_after_s`.
    """

    def __init__(self, client: redis.Redis, node_id: str, after_s: float) -> None:
        self._client = client
        self._node_id = node_id
        self._after_ms = int(after_s * 1000)
        self._pause_s = min(PAUSE_S, after_s / 2)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s * random.uniform(0.7, 1.3))
            try:
                lock_ms = max(100, int(self._pause_s * 700))
                if await self._client.set(names.SWEEPER, self._node_id, nx=True, px=lock_ms):
                    await self._look()
                    await run_script(self._client, gang_scripts.SWEEP, utc_now(), silence_ms(self._after_ms / 1000))
            except (RedisError, OSError, TimeoutError):  # the claims report it
                continue

    async def _look(self) -> None:
        members: Any = await self._client.smembers(names.HOLDERS)
        holders = sorted(worker.decode(errors="replace") for worker in members)
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hkeys(names.GONE)
            for worker_id in holders:
                pipeline.exists(heartbeat_key(worker_id))
            gone, *alive = await pipeline.execute()
        suspects = {worker.decode(errors="replace") for worker in gone}
        for worker_id, is_alive in zip(holders, alive, strict=True):
            if not is_alive or worker_id in suspects:
                back = await run_script(self._client, scripts.TAKE_BACK, worker_id, self._after_ms, utc_now())
                if back:
                    logger.bind(worker=worker_id, tasks=back).warning("a dead worker's tasks went back to the queue")
