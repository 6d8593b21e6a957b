"""The attempts of one delivery: each in a child of its own, and none while the delivery waits for the next.

An attempt holds one of its origin's places. A delivery that waits for the next attempt holds none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from loguru import logger

from flowmesh.errors import LaunchError
from flowmesh.execution.delivery.delivery_children import DeliveryChildren
from flowmesh.execution.delivery.places import LOCAL
from flowmesh.execution.layout import Layout
from flowmesh.messages.job import Exit
from flowmesh.messages.output import Remote
from flowmesh.processes.helper import HelperLost, OnFrame
from flowmesh.processes.pipe import Credentials
from flowmesh.results import delivery
from flowmesh.results.job import DeliveryJob, DeliveryReport, Target
from flowmesh.tasks.verdicts import describe_exit
from flowmesh.web.origins import shown_origin

GIVE_UP_S = 10.0
T = TypeVar("T")

Ended = DeliveryReport | str | None
"""How a delivery ended: its report; why its process left none; None: it was stopped."""


class Attempts:
    """
    Args:
        attempt: the task's.
        targets: of the task and its merged children; the first with an http destination decides the origin.
        stopped: whether the delivery is to stop; checked after each wait.
        on_frame: gets the frames of its children.
        on_wait: called with what the delivery waits for, and with "" when it waits no longer.
    """

    def __init__(
        self,
        children: DeliveryChildren,
        layout: Layout,
        *,
        attempt: int,
        task_id: str,
        targets: tuple[Target, ...],
        stopped: Callable[[], bool],
        on_frame: OnFrame | None = None,
        on_wait: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.origin = origin_of(targets)
        self._children = children
        self._spool = layout.spool(attempt)
        self._attempt = attempt
        self._stopped = stopped
        self._on_frame = on_frame
        self._on_wait = on_wait
        self._log = logger.bind(task=task_id)
        self._waiting: asyncio.Task[Any] | None = None
        """There is no child now that could be killed."""
        self._last_error = ""

    @property
    def must_wait(self) -> bool:
        """Whether its origin has no free place."""
        return not self._children.places.is_free(self.origin)

    async def write_locally(self, job: DeliveryJob) -> None:
        """Write the results to disk in a child, before the delivery waits for the network."""
        await asyncio.to_thread(delivery.write_job, delivery.only_local(job), self._spool)
        async with self._children.places.hold(LOCAL):
            if not self._stopped():
                await self._outcome(self._children.run(self._attempt, Credentials(), self._on_frame))

    async def send(self, job: DeliveryJob) -> Ended:
        """Run attempts until everything has arrived, or it has failed for good.

        Raises:
            LaunchError: there is no child.
        """
        await asyncio.to_thread(delivery.write_job, job, self._spool)
        return await self._repeat(None)

    async def attend(self, child: Awaitable[Exit]) -> Ended:
        """Like `send`; the first attempt is a child that an earlier supervisor started.

        It holds a place if there is a free one: it may have been started under other settings.
        """
        return await self._repeat(child)

    async def give_up(self) -> None:
        """Have S3 forget parts of a delivery that was cancelled. Best effort, and bounded."""
        if not await asyncio.to_thread(delivery.has_begun, self._attempt, self._spool):
            return
        try:
            await asyncio.to_thread(delivery.write_give_up, self._spool)
            greeting = await asyncio.to_thread(self._children.greeting)
            async with asyncio.timeout(GIVE_UP_S):
                await self._children.run(self._attempt, greeting)
        except (LaunchError, OSError) as error:  # TimeoutError is one
            self._log.warning("parts of a cancelled delivery may be left in S3: {}", error or "no answer")

    def stop(self) -> None:
        """End it now, if `stopped` says so by then."""
        if self._waiting is not None:
            self._waiting.cancel()
        self._children.kill(self._attempt)

    async def _repeat(self, child: Awaitable[Exit] | None) -> Ended:
        while True:
            ended = await self._one(child)
            if not isinstance(ended, DeliveryReport) or ended.again_in_s is None:
                return ended
            child = None
            self._note_failure(ended)
            self.origin = ended.origin or self.origin
            until = time.monotonic() + ended.again_in_s
            self._on_wait(f"attempt {ended.attempts + 1} in {ended.again_in_s:.0f} s: {ended.error}")
            if not await self._wait(asyncio.sleep(until - time.monotonic())):
                return None

    async def _one(self, child: Awaitable[Exit] | None) -> Ended:
        """One attempt, in a place; an adopted child is not kept waiting for one."""
        places = self._children.places
        if child is not None and not places.is_free(self.origin):
            return await self._outcome(child)
        if not places.is_free(self.origin):
            self._on_wait(f"a place: delivery.concurrency deliveries to {self.origin or 'disk'} are running")
        place = places.hold(self.origin)
        if not await self._wait(place.__aenter__()):
            if child is None:
                return None
            return await self._outcome(child)
        try:
            self._on_wait("")
            if child is None:
                if self._stopped():
                    return None
                greeting = await asyncio.to_thread(self._prepare)
                if self._stopped():
                    return None
                child = self._children.run(self._attempt, greeting, self._on_frame)
            return await self._outcome(child)
        finally:
            await place.__aexit__(None, None, None)

    def _prepare(self) -> Credentials:
        """In a thread, before each attempt."""
        delivery.forget_report(self._spool)
        return self._children.greeting()

    async def _outcome(self, child: Awaitable[Exit]) -> Ended:
        try:
            exit_ = await child
            why = f"its process ended without a report ({describe_exit(exit_)})"
        except HelperLost as error:
            why = str(error)
        except LaunchError:
            if self._stopped():
                return None
            raise
        report = delivery.read_report(self._spool)
        if report is not None and (report.again_in_s is None or not self._stopped()):
            for note in report.notes:
                self._log.info("delivery: {}", note)
            return report
        return None if self._stopped() else why

    async def _wait(self, what: Coroutine[Any, Any, Any]) -> bool:
        """False if the delivery was stopped before or meanwhile."""
        if self._stopped():  # while something else was awaited: nothing would end this wait
            what.close()
            return False
        self._waiting = asyncio.create_task(what)
        try:
            await asyncio.wait({self._waiting})
            return not self._waiting.cancelled()
        finally:
            self._waiting = None

    def _note_failure(self, report: DeliveryReport) -> None:
        """Each cause once, from the first failed attempt on."""
        if report.error == self._last_error:
            return
        self._last_error = report.error
        self._log.warning("delivery attempt {} failed, it is tried again: {}", report.attempts, report.error)


def origin_of(targets: tuple[Target, ...]) -> str:
    """The origin that results of these targets are sent to; LOCAL if to none."""
    urls = [target.destination.url for target in targets if isinstance(target.destination, Remote)]
    return next((shown_origin(url) for url in urls if url), LOCAL)
