"""Subscribes to the tasks channel and to the control channel, and passes each message on.

What is published while a subscription is broken is lost. Such a gap is reported, so that the node can register again
and the orchestrator requeues what it had dispatched into the gap.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.connection_health import ConnectionHealth
from flowmesh.bus.pushes import Feed, Push


class Subscriber:
    """One subscription, renewed whenever it breaks.

    Args:
        handlers: by channel, called with the raw bytes of each message.
        on_subscribed: called each time the subscription is confirmed; with True if there was a gap before.
        on_unsubscribed: called when the subscription breaks.
        silence_s: after this time without a message the connection is checked with a PING.
        what: for the log, where it is not the tasks' channel.
        gather_s: how long messages may wait for others, with which they are read at once.
    """

    def __init__(
        self,
        client: redis.Redis,
        handlers: dict[str, Callable[[bytes], None]],
        on_subscribed: Callable[[bool], None],
        on_unsubscribed: Callable[[], None],
        *,
        silence_s: float,
        what: str = "",
        gather_s: float = 0.0,
    ) -> None:
        self.up = False
        """Whether the subscription is confirmed and unbroken."""
        suffix = f" to {what}" if what else ""
        self.trouble = ConnectionHealth(f"not subscribed{suffix}", f"subscription{suffix} works again")
        self._what = what
        self._client = client
        self._handlers = {channel.encode(): handler for channel, handler in handlers.items()}
        self._on_subscribed = on_subscribed
        self._on_unsubscribed = on_unsubscribed
        self._silence_s = silence_s
        self._gather_s = gather_s
        self._subscribed_before = False
        self._awaited = 0
        """Channels whose subscription is not confirmed yet."""

    async def run(self) -> None:
        """Subscribe until cancelled."""
        backoff = Backoff()
        while True:
            began = time.monotonic()
            try:
                await self._listen()
            except (RedisError, OSError, TimeoutError) as error:
                self.up = False
                self._on_unsubscribed()
                self.trouble.failed(error)
            if time.monotonic() - began > self._silence_s:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    async def _listen(self) -> None:
        """Pass messages on until the connection breaks; raises the error that broke it."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            self._awaited = len(self._handlers)
            feed = Feed(connection, self._on_push, gather_s=self._gather_s)
            await connection.send_command("SUBSCRIBE", *self._handlers, check_health=False)
            await self._watch(feed, connection)
        finally:
            await connection.disconnect(nowait=True)
            await pool.release(connection)

    async def _watch(self, feed: Feed, connection: Any) -> None:
        """Silence is normal; silence after a PING is a dead connection."""
        loop = asyncio.get_running_loop()
        pinged_at = -math.inf
        while True:
            since = max(feed.heard_at, pinged_at)
            await asyncio.wait([feed.ended], timeout=max(0.0, since + self._silence_s - loop.time()))
            if feed.ended.done():
                raise feed.ended.result()
            if feed.heard_at > since:
                continue
            if pinged_at > feed.heard_at:
                raise TimeoutError(f"no answer to a PING for {self._silence_s:g} s")
            pinged_at = loop.time()  # before it is sent: the answer may come first
            await connection.send_command("PING", check_health=False)

    def _on_push(self, push: Push) -> None:
        kind, channel, data = push
        if kind == b"message":
            if handler := self._handlers.get(channel):
                handler(data)
        elif kind == b"subscribe":
            self._awaited -= 1
            if self._awaited == 0:
                self._confirmed()

    def _confirmed(self) -> None:
        gap = self._subscribed_before
        self._subscribed_before = True
        self.up = True
        self.trouble.works()
        if self._what:
            logger.info("listening on {}", self._what)
        else:
            logger.info("subscribed{}", " again; messages may have been missed" if gap else "")
        self._on_subscribed(gap)
