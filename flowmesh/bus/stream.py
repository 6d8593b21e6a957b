"""A way in that forgets nothing: a worker's own Redis Stream, beside the channel. Off unless `redis.stream` says so.

An entry is acknowledged, and removed, when what it leads to stands in the journal. Until then Redis keeps it for us,
over restarts of ours; what was published while no node ran waits there, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from flowmesh.bus.backoff import Backoff
from flowmesh.bus.connection import RedisError, leave_replica, redis
from flowmesh.bus.trouble import Trouble

GROUP = "flowmesh"
FIELD = b"message"
AT_ONCE = 16
"""Entries that one read may bring."""
RETRY_S = 1.0
"""Between two tries at entries that could not be taken."""

Entry = tuple[bytes, dict[bytes, bytes]]


def stream_key(worker_id: str) -> str:
    return f"tasks:{worker_id}"


class Stream:
    """Reads one worker's stream for ever. Needs a client of its own: its reads block.

    Args:
        take: gets a message and its entry's id, and says whether it is done with it.
        block_s: how long one read waits; shorter than the client's timeout.
    """

    def __init__(
        self, client: redis.Redis, worker_id: str, take: Callable[[bytes, str], bool], *, block_s: float
    ) -> None:
        self.up = False
        self._client = client
        self._key = stream_key(worker_id)
        self.trouble = Trouble("stream not read", "stream is read again", stream=self._key)
        self._consumer = worker_id
        self._take = take
        self._block_ms = max(1, int(block_s * 1000))
        self._left = False
        """Whether there are entries that are ours and not done."""

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._read_on(backoff)
            except (RedisError, OSError, TimeoutError) as error:
                self.up = False
                self.trouble.met(error)
                await leave_replica(self._client, error)
            await asyncio.sleep(backoff.next_s())

    async def _read_on(self, backoff: Backoff) -> None:
        """One connection's life; ends with the error that ended it."""
        await self._make_group()
        self._left = True  # of the node before this one, or of the connection before
        tried = 0.0
        while True:
            if self._left and time.monotonic() - tried >= RETRY_S:
                tried = time.monotonic()
                await self._read_left()
            if not self.up:
                self.up = True
                backoff.reset()
                self.trouble.over()
            block_ms = min(self._block_ms, int(RETRY_S * 1000)) if self._left else self._block_ms
            for entry in await self._read(">", block_ms):
                if not await self._handle(entry):
                    self._left = True

    async def _make_group(self) -> None:
        try:
            await self._client.xgroup_create(self._key, GROUP, id="0", mkstream=True)  # "0": what waits there, too
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _read_left(self) -> None:
        """All that Redis gave us and that we have not acknowledged, oldest first."""
        self._left = False
        after = "0"
        while entries := await self._read(after, None):
            for entry in entries:
                if not await self._handle(entry):
                    self._left = True
            after = entries[-1][0].decode()

    async def _read(self, after: str, block_ms: int | None) -> list[Entry]:
        answer: Any = await self._client.xreadgroup(GROUP, self._consumer, {self._key: after}, AT_ONCE, block_ms)
        return list(answer[0][1]) if answer else []

    async def _handle(self, entry: Entry) -> bool:
        """Whether it is done with."""
        entry_id, fields = entry
        message = fields.get(FIELD)
        if message is None:  # removed by somebody, or never one of ours
            logger.bind(stream=self._key, entry=entry_id.decode()).warning("entry without a message dropped")
        elif not self._take(message, entry_id.decode()):
            return False
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xack(self._key, GROUP, entry_id)
            pipeline.xdel(self._key, entry_id)
            await pipeline.execute()
        return True
