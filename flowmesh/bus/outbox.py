"""Sends the journal's outbox to Redis: in order, each event at least once, until Redis takes it and somebody hears it.

PUBLISH tells how many receivers there were. With none, the events are held back: an orchestrator that restarts gets
them when it listens again. That is bounded, and a deployment in which nobody ever listens loses nothing by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.connection_health import ConnectionHealth
from flowmesh.bus.exchange import exchange, leave_replica

MOST_HELD = 10_000
"""Events that are held back for a listener; beyond that, the oldest are given up."""
LONGEST_POLL_S = 1.0
"""Between two looks for a listener."""
LAST_LOOK_S = 1.5
"""How long a node that ends waits for a listener."""


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
        hold_s: how long events wait for somebody who listens. Afterwards they are sent to nobody, until somebody
            listens again. 0: they never wait.
    """

    def __init__(
        self,
        client: redis.Redis,
        queue: Queue,
        on_sent: Callable[[list[bytes]], None],
        *,
        guard: str,
        hold_s: float = 0.0,
    ) -> None:
        self.trouble = ConnectionHealth("events are held back", "events are sent again")
        self.unheard = 0
        """Events that were sent to nobody."""
        self._guard = guard
        self._client = client
        self._queue = queue
        self._on_sent = on_sent
        self._hold_s = hold_s
        self._nobody_since: float | None = None
        """Since when nobody listens, monotonic; None: somebody does, or nothing was sent yet."""
        self._gave_up = False
        """Whether nobody listened for `hold_s`."""
        self._posted = asyncio.Event()
        self._empty = asyncio.Event()

    @property
    def holding(self) -> bool:
        """Whether events wait for somebody who listens."""
        return self._nobody_since is not None and not self._gave_up

    @property
    def nobody_listens(self) -> bool:
        """Whether the last events had no receivers."""
        return self._nobody_since is not None

    def wake(self) -> None:
        self._empty.clear()
        self._posted.set()

    async def run(self) -> None:
        """Send until cancelled."""
        backoff, looks = Backoff(), Backoff(longest_s=LONGEST_POLL_S)
        self.wake()
        while True:
            batch = self._queue.outgoing(1) if self.holding else self._queue.outgoing()
            if not batch:
                self._posted.clear()
                self._empty.set()
                await self._posted.wait()
                continue
            try:
                events = [("PUBLISH", channel, payload) for _, channel, payload in batch]
                _, *receivers = await exchange(self._client, ("DEL", self._guard), *events, transaction=True)
            except (RedisError, OSError, TimeoutError) as error:
                self.trouble.failed(error, waiting=self._queue.outbox_size())
                await leave_replica(self._client, error)
                await asyncio.sleep(backoff.next_s())
                continue
            self.trouble.works()
            backoff.reset()
            if any(receivers):
                self._heard()
                looks.reset()
            elif given_up := self._given_up(len(batch)):
                batch = batch[:given_up]
            else:
                await asyncio.sleep(looks.next_s())
                continue
            self._queue.sent(batch[-1][0])
            self._on_sent([payload for _, _, payload in batch])

    def _heard(self) -> None:
        if self._nobody_since is not None:
            logger.info("somebody listens to the tasks' events again")
        self._nobody_since, self._gave_up = None, False

    def _given_up(self, events: int) -> int:
        """How many of a batch's events, which nobody received, are not kept. A batch is one transaction, so it was
        received as a whole or not at all."""
        now = time.monotonic()
        if self._nobody_since is None:
            self._nobody_since = now
            if self._hold_s:
                logger.warning("nobody listens to the tasks' events: they are held back, {:g} s at most", self._hold_s)
        if not self._gave_up and now - self._nobody_since >= self._hold_s:
            self._gave_up = True
            logger.warning("nobody listens to the tasks' events: they are sent to nobody from now on")
        given_up = events if self._gave_up else min(events, max(0, self._queue.outbox_size() - MOST_HELD))
        self.unheard += given_up
        return given_up

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until the outbox is empty; False where it is not within `timeout_s`, or nobody listens."""
        end = time.monotonic() + timeout_s
        while not self._empty.is_set():
            if self.holding:
                end = min(end, time.monotonic() + LAST_LOOK_S)
            if (left := end - time.monotonic()) <= 0:
                return False
            try:
                await asyncio.wait_for(self._empty.wait(), min(left, LAST_LOOK_S))
            except TimeoutError:
                if self.holding:
                    return False
        return True
