"""How many deliveries run at once: counted for each origin, so that a dead server holds up nobody else's results."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

LOCAL = ""
"""The place of what only writes to disks: never behind the network."""


class Places:
    """
    Args:
        each: places of each origin, and of local writing.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._used: dict[str, asyncio.Semaphore] = {}
        self._interested: dict[str, int] = {}
        """Holders and waiters of each; an origin without any is forgotten."""

    def is_free(self, origin: str) -> bool:
        """Whether a place can be had at once."""
        found = self._used.get(origin)
        return self._each > 0 if found is None else not found.locked()

    @contextlib.asynccontextmanager
    async def hold(self, origin: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it inside the block."""
        place = self._used.setdefault(origin, asyncio.Semaphore(self._each))
        self._interested[origin] = self._interested.get(origin, 0) + 1
        try:
            async with place:
                yield
        finally:
            self._interested[origin] -= 1
            if not self._interested[origin]:
                del self._interested[origin], self._used[origin]
