"""Listens on the tasks channel (and on our own control channel), and hands each message to the supervisor.

A subscription that broke has a gap: what was published meanwhile is gone. The supervisor is told, and re-announces
the node so that the orchestrator queues again what it had dispatched into the gap.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from loguru import logger

from flowmesh.bus.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.trouble import Trouble


class Intake:
    """Subscribes for ever.

    Args:
        on_message: called with the raw bytes of each message, by channel.
        on_subscribed: called each time the subscription stands; True where there was a gap before.
        on_unsubscribed: called when the subscription breaks.
    """

    def __init__(
        self,
        client: redis.Redis,
        handlers: dict[str, Callable[[bytes], None]],
        on_subscribed: Callable[[bool], None],
        on_unsubscribed: Callable[[], None],
        *,
        silence_s: float,
    ) -> None:
        self.up = False
        self.trouble = Trouble("not subscribed", "subscribed")
        self._client = client
        self._handlers = {channel.encode(): handler for channel, handler in handlers.items()}
        self._on_subscribed = on_subscribed
        self._on_unsubscribed = on_unsubscribed
        self._silence_s = silence_s
        self._subscribed_before = False

    async def run(self) -> None:
        backoff = Backoff()
        while True:
            began = time.monotonic()
            try:
                await self._listen()
            except (RedisError, OSError, TimeoutError) as error:
                self.up = False
                self._on_unsubscribed()
                self.trouble.met(error)
            if time.monotonic() - began > self._silence_s:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    async def _listen(self) -> None:
        """One subscription's life; ends with the error that ended it."""
        async with self._client.pubsub() as pubsub:
            await pubsub.subscribe(*self._handlers)
            awaited = len(self._handlers)
            pinged = False
            while True:
                message = await pubsub.get_message(timeout=self._silence_s)
                if message is None:
                    # Silence is normal, two in a row with a PING between them is a dead connection.
                    if pinged:
                        raise TimeoutError(f"no answer to a PING for {self._silence_s:g} s")
                    await pubsub.ping()
                    pinged = True
                    continue
                pinged = False
                if message["type"] == "subscribe":
                    awaited -= 1
                    if awaited == 0:
                        awaited = len(self._handlers)  # should redis-py subscribe anew by itself, that is a gap, too
                        self._stands()
                elif message["type"] == "message" and (handler := self._handlers.get(message["channel"])):
                    handler(message["data"])

    def _stands(self) -> None:
        gap = self._subscribed_before
        self._subscribed_before = True
        self.up = True
        self.trouble.over()
        logger.info("subscribed{}", " again, after a gap" if gap else "")
        self._on_subscribed(gap)
