"""Sends the journal's outbox to Redis: in order, each event at least once, until Redis takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, leave_replica, redis
from flowmesh.bus.connection_health import ConnectionHealth


class Queue(Protocol):
    """The events on disk: the journal."""

    def outgoing(self, limit: int = 100) -> list[tuple[int, str, bytes]]: ...

    def sent(self, seq: int) -> None: ...

    def outbox_size(self) -> int: ...


class Outbox:
    """Sends the events of `queue`. Call `wake()` after each new one.

    Args:
        on_sent: called with the payloads that Redis has taken.
        guard: a key that never exists. Each batch deletes it: a no-op, but one that a replica refuses. A PUBLISH to a
            replica would be accepted and reach no subscriber of the master.
    """

    def __init__(
        self, client: redis.Redis, queue: Queue, on_sent: Callable[[list[bytes]], None], *, guard: str
    ) -> None:
        self.trouble = ConnectionHealth("events are held back", "events are sent again")
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
        """Send until cancelled."""
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
                self.trouble.failed(error, waiting=self._queue.outbox_size())
                await leave_replica(self._client, error)
                await asyncio.sleep(backoff.next_s())
                continue
            self._queue.sent(batch[-1][0])
            self.trouble.works()
            backoff.reset()
            self._on_sent([payload for _, _, payload in batch])

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until the outbox is empty; False where it is not within `timeout_s`."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
