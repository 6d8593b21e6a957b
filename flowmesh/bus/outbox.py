"""Sends the journal's outbox to Redis: in order, each at least once, for as long as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from flowmesh.bus.backoff import Backoff
from flowmesh.bus.connection import RedisError, leave_replica, redis
from flowmesh.bus.trouble import Trouble


class Queue(Protocol):
    """Where the events wait: the journal."""

    def outgoing(self, limit: int = 100) -> list[tuple[int, str, bytes]]: ...

    def sent(self, seq: int) -> None: ...

    def outbox_size(self) -> int: ...


class Outbox:
    """One pump. `wake()` after each post.

    Args:
        guard: a key of ours that never exists. To delete it does nothing, but a replica refuses that; a PUBLISH
            it would take, and tell nobody who matters. So the events wait.
    """

    def __init__(
        self, client: redis.Redis, queue: Queue, on_sent: Callable[[list[bytes]], None], *, guard: str
    ) -> None:
        self.trouble = Trouble("events wait", "events flow again")
        self._guard = guard
        self._client = client
        self._queue = queue
        self._on_sent = on_sent
        self._posted = asyncio.Event()
        self._empty = asyncio.Event()

    def wake(self) -> None:
        self._empty.clear()
        self._posted.set()

    async def run(self) -> None:
        backoff = Backoff()
        self.wake()
        while True:
            batch = self._queue.outgoing()
            if not batch:
                self._posted.clear()
                self._empty.set()
                await self._posted.wait()
                continue
            try:
                async with self._client.pipeline(transaction=True) as pipeline:
                    pipeline.delete(self._guard)
                    for _, channel, payload in batch:
                        pipeline.publish(channel, payload)
                    await pipeline.execute()
            except (RedisError, OSError, TimeoutError) as error:
                self.trouble.met(error, waiting=self._queue.outbox_size())
                await leave_replica(self._client, error)
                await asyncio.sleep(backoff.next_s())
                continue
            self._queue.sent(batch[-1][0])
            self.trouble.over()
            backoff.reset()
            self._on_sent([payload for _, _, payload in batch])

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until everything posted so far has left; False where it has not in `timeout_s`."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
