"""Dispatches over a Redis Stream per worker, in addition to the channel. Off unless `redis.stream` is set.

Unlike the channel it loses nothing: an entry is acknowledged and deleted only when its task is in the journal. Until
then Redis keeps it, over restarts of the node and while no node runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.connection_health import ConnectionHealth
from flowmesh.bus.exchange import leave_replica

GROUP = "flowmesh"
FIELD = b"message"
AT_ONCE = 16
"""Entries per read."""
RETRY_S = 1.0
"""Between two attempts at entries that could not be journalled."""
LOOK_S = 30.0
"""Between two looks for entries that were delivered to another process with our id."""

Entry = tuple[bytes, dict[bytes, bytes]]


def stream_key(worker_id: str) -> str:
    return f"tasks:{worker_id}"


class Stream:
    """Reads one worker's stream.

    Args:
        client: used by nothing else: the reads block.
        take: called with a message and its entry's id; returns whether the entry can be deleted.
        block_s: how long one read waits; must be shorter than the client's timeout.
        may_read: asked before each read; while it is false, entries stay in the stream.
    """

    def __init__(
        self,
        client: redis.Redis,
        worker_id: str,
        take: Callable[[bytes, str], bool],
        *,
        block_s: float,
        may_read: Callable[[], bool] = lambda: True,
    ) -> None:
        self.up = False
        self._client = client
        self._key = stream_key(worker_id)
        self.trouble = ConnectionHealth("stream not read", "stream is read again", stream=self._key)
        self._consumer = worker_id
        self._take = take
        self._may_read = may_read
        self._block_ms = max(1, int(block_s * 1000))
        self._pending = False
        """Whether entries were delivered to us and are not acknowledged."""

    async def run(self) -> None:
        """Read until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._read_until_error(backoff)
            except (RedisError, OSError, TimeoutError) as error:
                self.up = False
                self.trouble.failed(error)
                await leave_replica(self._client, error)
            await asyncio.sleep(backoff.next_s())

    async def _read_until_error(self, backoff: Backoff) -> None:
        await self._make_group()
        self._pending = True  # perhaps: an earlier process or connection may have left some
        tried = 0.0
        while True:
            if not self._may_read():
                await asyncio.sleep(RETRY_S)
                continue
            if time.monotonic() - tried >= (RETRY_S if self._pending else LOOK_S):
                tried = time.monotonic()
                await self._read_pending()
            if not self.up:
                self.up = True
                backoff.reset()
                self.trouble.works()
            if self._pending:  # what was not taken comes first; more would not be taken either
                await asyncio.sleep(RETRY_S)
                continue
            for entry in await self._read(">", self._block_ms):
                if self._pending or not await self._handle(entry):
                    self._pending = True

    async def _make_group(self) -> None:
        try:
            await self._client.xgroup_create(self._key, GROUP, id="0", mkstream=True)  # "0": from the first entry
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _read_pending(self) -> None:
        """Handle the entries that were delivered to us and are not acknowledged, oldest first."""
        self._pending = False
        after = "0"
        while entries := await self._read(after, None):
            for entry in entries:
                if not await self._handle(entry):
                    self._pending = True
                    return
            after = entries[-1][0].decode()

    async def _read(self, after: str, block_ms: int | None) -> list[Entry]:
        answer: Any = await self._client.xreadgroup(GROUP, self._consumer, {self._key: after}, AT_ONCE, block_ms)
        return list(answer[0][1]) if answer else []

    async def _handle(self, entry: Entry) -> bool:
        """Take one entry; whether it was acknowledged and deleted."""
        entry_id, fields = entry
        message = fields.get(FIELD)
        if message is None:  # deleted meanwhile, or not written by an orchestrator
            logger.bind(stream=self._key, entry=entry_id.decode()).warning(
                "dropped a stream entry without a `message` field"
            )
        elif not self._take(message, entry_id.decode()):
            return False
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xack(self._key, GROUP, entry_id)
            pipeline.xdel(self._key, entry_id)
            await pipeline.execute()
        return True
