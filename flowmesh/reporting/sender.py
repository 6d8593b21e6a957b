"""Sends what waits in one lane of the journal: in batches, by a child that the loop never waits for.

A row leaves the journal once its receiver has taken it, so that each arrives at least once, whatever is killed. A
receiver that is down or slow is tried again with growing pauses, and holds up nobody: each lane has its own child.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.errors import LaunchError
from flowmesh.execution.helper_fork import helper_fork
from flowmesh.execution.layout import Layout
from flowmesh.processes.helper import Helpers
from flowmesh.processes.protocol import Fork
from flowmesh.reporting.batch import Answer, Batch, Item, end_batch, read_answers, write_batch
from flowmesh.tasks.catalogue import DELIVERY
from flowmesh.tasks.journal import JournalError
from flowmesh.tasks.sendings_table import Sendings, Waiting

FOLDER = "reporting"
LOG = f"{FOLDER}.log"
FIRST_ATTEMPT = 1 << 51
"""Attempt numbers of these children are above those of all others."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 300.0
REFUSED_PAUSE_S, LONGEST_REFUSED_PAUSE_S = 60.0, 3600.0
"""Before a message that the receiver refused is sent again; others are sent meanwhile."""
LOOK_S = 60.0

_attempts = itertools.count(FIRST_ATTEMPT + time.time_ns() // 1_000_000)


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """A receiver, and how it is sent to."""

    name: str
    """In the journal."""
    shown: str
    """For people: without secrets."""
    entry: str
    """`module:function` of the child."""
    receiver: Callable[[], bytes]
    """Gives what the child needs to know; called for each."""
    limit_s: float
    """After this time a child is killed."""
    keep_s: float
    """How old a message may become."""
    most: int = 10
    """Messages of one child."""
    collect_s: float = 0.0
    """How long the first message waits for others."""
    env: dict[str, str] = {}
    """Of the child, besides what tasks get."""


class Sender:
    def __init__(self, lane: Lane, sendings: Sendings, helpers: Helpers, layout: Layout) -> None:
        self.lane = lane
        self.error = ""
        """Why the last attempt failed; empty: it did not."""
        self.sent = 0
        """Since the start."""
        self._sendings = sendings
        self._helpers = helpers
        self._layout = layout
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._hurried = asyncio.Event()
        self._backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)

    def wake(self) -> None:
        """Something was added to the lane."""
        self._empty.clear()
        self._wake.set()

    def hurry(self) -> None:
        """The node ends: wait for no further messages."""
        self._hurried.set()

    async def emptied(self) -> None:
        """Wait until nothing waits that could be sent now."""
        await self._empty.wait()

    def summary(self) -> dict[str, Any]:
        """For `flowmesh status`."""
        return {
            "to": self.lane.shown,
            "waiting": self._sendings.waiting(self.lane.name),
            "sent": self.sent,
            "dropped": self._sendings.dropped.get(self.lane.name, 0),
            "error": self.error or None,
        }

    async def run(self) -> None:
        """Send until cancelled."""
        known = await asyncio.to_thread(read_answers, self._folder)
        arrived = {answer.id for answer in known if not answer.error}  # to a child of an earlier supervisor
        with contextlib.suppress(JournalError):
            rows = self._sendings.due(self.lane.name, len(arrived))
            self._sendings.sent(row.seq for row in rows if row.id in arrived)
        while True:
            self._wake.clear()
            try:
                pause_s = await self._send_some()
            except JournalError:  # reported by the checks of the journal
                pause_s = self._backoff.next_s()
            except Exception as error:  # noqa: BLE001 - the boundary: the node must not end with its sender
                logger.opt(exception=error).error("unhandled error in a sender")
                self._failed(f"{type(error).__name__}: {error}")
                pause_s = self._backoff.next_s()
            if pause_s > 0:
                await asyncio.sleep(pause_s)

    async def _send_some(self) -> float:
        """One batch; returns how long to wait before the next."""
        rows = self._sendings.due(self.lane.name, self.lane.most)
        if not rows:
            await self._rest()
            return 0.0
        if self.lane.collect_s and len(rows) < self.lane.most:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurried.wait(), self.lane.collect_s)
            rows = self._sendings.due(self.lane.name, self.lane.most)
        answers, trouble = await self._attempt(rows)
        by_id = {answer.id: answer for answer in answers}
        self._sendings.sent(row.seq for row in rows if row.id in by_id and not by_id[row.id].error)
        self.sent += sum(not answer.error for answer in answers)
        failed = next((answer for answer in answers if answer.error and not answer.refused), None)
        for row in rows:
            answer = by_id.get(row.id)
            if answer is not None and answer.refused:
                self._refused(row, answer)
            elif time.time() - row.posted_at > self.lane.keep_s and (answer is None or answer.error):
                self._give_up(row, trouble if answer is None else answer.error)
        if failed is not None:
            self._failed(failed.error)
            return max(failed.retry_after_s, self._backoff.next_s())
        if trouble:
            self._failed(trouble)
            return self._backoff.next_s()
        self._works()
        return 0.0

    async def _rest(self) -> None:
        """Wait until something may be due."""
        self._empty.set()
        due_s = self._sendings.next_due_s(self.lane.name)
        try:
            await asyncio.wait_for(self._wake.wait(), LOOK_S if due_s is None else min(due_s + 0.01, LOOK_S))
        except TimeoutError:
            return

    async def _attempt(self, rows: list[Waiting]) -> tuple[list[Answer], str]:
        """Send by a child; what it found, and why it found nothing on the rest."""
        folder = self._folder
        batch = Batch(receiver=self.lane.receiver(), items=tuple(Item(id=row.id, body=row.body) for row in rows))
        trouble = ""
        try:
            await asyncio.to_thread(write_batch, folder, batch)
            async with asyncio.timeout(self.lane.limit_s):
                await self._helpers.run(DELIVERY, self._fork(folder))
        except TimeoutError:
            trouble = f"not done within {self.lane.limit_s:g} s"
        except (LaunchError, OSError) as error:
            trouble = str(error)
        answers = await asyncio.to_thread(end_batch, folder)
        if not trouble and len(answers) < len(rows) and not any(each.error for each in answers):
            trouble = f"the sending process ended early; see {self._log}"
        return answers, trouble

    @property
    def _folder(self) -> Path:
        return self._layout.state_dir / FOLDER / self.lane.name

    @property
    def _log(self) -> Path:
        return self._layout.log_dir / LOG

    def _fork(self, folder: Path) -> Fork:
        return helper_fork(self._layout, next(_attempts), self.lane.entry, folder, LOG, env=self.lane.env)

    def _refused(self, row: Waiting, answer: Answer) -> None:
        if time.time() - row.posted_at > self.lane.keep_s:
            self._give_up(row, answer.error)
            return
        if not row.tries:
            logger.bind(to=self.lane.shown, id=row.id).warning("notification refused, tried again: {}", answer.error)
        pause_s = min(REFUSED_PAUSE_S * 2.0 ** min(row.tries, 10), LONGEST_REFUSED_PAUSE_S)
        self._sendings.later(row, max(pause_s, answer.retry_after_s))

    def _give_up(self, row: Waiting, why: str) -> None:
        self._sendings.sent([row.seq])
        self._sendings.dropped[self.lane.name] = self._sendings.dropped.get(self.lane.name, 0) + 1
        age_s = round(time.time() - row.posted_at)
        logger.bind(to=self.lane.shown, id=row.id, age_s=age_s).error("given up, not sent: {}", why)

    def _failed(self, why: str) -> None:
        why = self._layout.secrets(why)
        if not self.error:
            logger.bind(to=self.lane.shown).warning("cannot be sent, tried again: {}", why)
        self.error = why

    def _works(self) -> None:
        if self.error:
            logger.bind(to=self.lane.shown).info("sent again")
        self.error = ""
        self._backoff.reset()
