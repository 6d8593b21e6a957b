"""Waits for entries of the queue: blocks on the wake-up lists of classes, whose token wakes one idle node."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any

from flowmesh.bus.connection import RedisError, redis
from flowmesh.queue import names

POLL_S = (4.0, 8.0)
"""Bounds of the pause, drawn each time, after which an idle node looks without having been woken."""


class WakeUps:
    """
    Args:
        client: used by nothing else: its reads block for up to POLL_S.
    """

    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    async def token(self, keys: Sequence[str], renewed: asyncio.Event) -> str | None:
        """Take a token.

        Args:
            keys: of the classes to wait for.
            renewed: set when others are to be waited for.

        Returns:
            the key of the class whose token was taken; None: none came, or `renewed` was set.

        Raises:
            RedisError, OSError, TimeoutError: Redis is unreachable or refused the command.
        """
        lists = {names.wake_key(key): key for key in keys}
        taking = asyncio.create_task(self._take(list(lists)))
        changing = asyncio.create_task(renewed.wait())
        try:
            await asyncio.wait([taking, changing], return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                return None
            answer = taking.result()
            return None if answer is None else lists[answer[0].decode()]
        finally:
            changing.cancel()
            if not taking.done():
                taking.cancel()
                with contextlib.suppress(asyncio.CancelledError, RedisError, OSError, TimeoutError):
                    await taking
                await self.client.connection_pool.disconnect()  # a token that comes now must go to somebody else

    async def _take(self, lists: list[str]) -> Any:
        return await self.client.blpop(lists, timeout=int(random.uniform(*POLL_S)))
