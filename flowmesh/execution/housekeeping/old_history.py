"""Deletes the oldest of the journal's history, as `node.history_days`, `history_max` and `history_bytes` say."""

from __future__ import annotations

import asyncio
import datetime

from loguru import logger

from flowmesh.settings.schema import NodeSettings
from flowmesh.tasks.journal import Journal, JournalError

INTERVAL_S = 60.0
PAUSE_S = 0.05
"""Between two steps of a round: each takes the loop some milliseconds."""


async def keep_pruned(settings: NodeSettings, journal: Journal) -> None:
    """One round each INTERVAL_S, until cancelled. An error is logged; the next round tries again."""
    while True:
        await asyncio.sleep(INTERVAL_S)
        try:
            await prune(settings, journal)
        except JournalError as error:
            logger.warning("old history was not deleted: {}", error)


async def prune(settings: NodeSettings, journal: Journal, now: datetime.datetime | None = None) -> None:
    """One round, in small steps.

    Raises:
        JournalError: the journal cannot be read or written.
    """
    oldest = (now or datetime.datetime.now(datetime.UTC)) - datetime.timedelta(days=settings.history_days)
    before, keep, most_bytes = oldest.isoformat(), settings.history_max, settings.history_bytes
    while journal.prune_history(before=before, keep=keep, most_bytes=most_bytes):
        await asyncio.sleep(PAUSE_S)
    journal.keep_reserve()
