"""The node's workers in Redis: one registration a slot, which follows the slot's state, and recovers from gaps."""

from __future__ import annotations

import asyncio
import time

from loguru import logger

from flowmesh.bus.connection import redis
from flowmesh.bus.presence import Presence
from flowmesh.execution import task_events
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.orchestrator.worker_description import NodeDescription, presence

CUT_SOON_S = 60.0
"""A subscription that breaks within this time after an announcement was perhaps cut by what that led to."""
FIRST_QUIET_S = 5.0
LONGEST_QUIET_S = 300.0
"""How long the next announcement waits then: doubled with each cut."""


class Registration(Observer):
    def __init__(self, node: NodeDescription, executor: Executor, client: redis.Redis) -> None:
        self.subscribed = asyncio.Event()
        """Set once the tasks channel was subscribed to for the first time."""
        self._executor = executor
        self._listening = False
        self._gaps: set[str] = set()
        """Workers that may have missed a dispatch, and were not announced again yet."""
        self._cuts = 0
        """How often in a row the subscription broke soon after a worker was announced again."""
        self._announced_at = 0.0
        """When that was last, monotonic."""
        self._quiet_until = 0.0
        self.presences: dict[str, Presence] = {
            worker_id: presence(node, executor, slot, client, on_missed=self.on_missed, on_rival=self._on_rival)
            for worker_id, slot in executor.slots.items()
        }

    async def claim(self) -> None:
        """Take the worker ids. Raises BusyError where another live node has one."""
        await asyncio.gather(*(each.claim() for each in self.presences.values()))

    def _on_rival(self, slot: Slot[Run], reason: str) -> None:
        slot.displaced = reason
        self._executor.observers.on_slot_changed(slot)

    def resume(self) -> None:
        """Report the slots of adopted tasks as RUNNING."""
        for worker_id, slot in self._executor.slots.items():
            if slot.current is not None:
                self.presences[worker_id].set_status("RUNNING", slot.current.task_id)

    def drain(self) -> None:
        for each in self.presences.values():
            each.set_status("DRAINING")

    async def unregister(self, timeout_s: float) -> None:
        await asyncio.gather(*(each.unregister(timeout_s) for each in self.presences.values()))

    def on_subscribed(self, gap: bool) -> None:
        """The tasks channel is subscribed to; after a gap, what was dispatched meanwhile must be queued again."""
        self._listening = True
        self.subscribed.set()
        for worker_id, slot in self._executor.slots.items():
            if gap:
                self._gaps.add(worker_id)
            if (slot.idle or slot.trouble) and slot.current is None:
                self._rest(slot)
            self._heal(slot)

    def on_unsubscribed(self) -> None:
        """The subscription broke. Where that follows each new announcement, the next one waits.

        A document over the limit of Redis' pub/sub buffers does that: the orchestrator sends it again each time.
        """
        self._listening = False
        now = time.monotonic()
        self._cuts = self._cuts + 1 if self._announced_at and now - self._announced_at < CUT_SOON_S else 0
        if self._cuts:
            wait_s = min(LONGEST_QUIET_S, FIRST_QUIET_S * 2 ** (self._cuts - 1))
            self._quiet_until = now + wait_s
            logger.bind(cuts=self._cuts).warning(
                "the connection was cut again soon after this node was announced; announced again in {:.0f} s at the "
                "earliest. Perhaps a task document is over Redis' limit for subscribers (client-output-buffer-limit "
                "pubsub; `flowmesh doctor` reads it): send its data as a file or a URL, or raise the limit",
                wait_s,
            )

    def on_events_sent(self, sent: list[bytes]) -> None:
        """Restate the status of workers that the orchestrator may have set wrong.

        It sets a worker IDLE when it sees a success: one that is busy by then restates RUNNING, now and after that
        answer. It sets a worker RUNNING when it dispatches: one whose task failed, and perhaps never ran, restates its
        status.
        """
        ended = any(not task_events.is_start(event) for event in sent)
        failed = {task_events.failed_at(event) for event in sent}
        if ended:
            for each in self.presences.values():
                each.look_soon()
        for worker_id, slot in self._executor.slots.items():
            if worker_id in failed or (ended and (slot.current is not None or slot.trouble)):
                self.presences[worker_id].restate()
            self._heal(slot)

    def on_worker_event(self, event: bytes) -> None:
        """A message on the channel of workers' events; most are of other nodes."""
        for each in self.presences.values():
            each.on_event(event)

    def _heal(self, slot: Slot[Run]) -> None:
        """After a gap: announce the worker again, so that the orchestrator queues again what it had dispatched to it.

        That includes the tasks that the worker has. So it waits until it has none, and all events are sent.
        """
        worker_id, executor = slot.plan.worker_id, self._executor
        if worker_id not in self._gaps or executor.draining is not None or not self._listening:
            return
        if (quiet_s := self._quiet_until - time.monotonic()) > 0:
            asyncio.get_running_loop().call_later(quiet_s, self._heal, slot)
            return
        if not executor.runs.has_any_of(slot) and not executor.journal.outbox_size():
            self._gaps.discard(worker_id)
            self._announced_at = time.monotonic()
            logger.bind(worker=worker_id).info("announced again: a dispatch may have been missed")
            self.presences[worker_id].reannounce()

    def _rest(self, slot: Slot[Run], last: str | None = None) -> None:
        """Report a slot without a task, once dispatches can be received."""
        if self._executor.draining is None and self.subscribed.is_set():
            self.presences[slot.plan.worker_id].set_status("DEGRADED" if slot.trouble else "IDLE", last)

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        if self._executor.draining is None:
            self.presences[slot.plan.worker_id].set_status("RUNNING", run.task_id)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        self._rest(slot, last.task_id)
        self._heal(slot)

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        if slot.current is None:
            self._rest(slot)

    def on_missed(self, slot: Slot[Run]) -> None:
        self._gaps.add(slot.plan.worker_id)
        self._heal(slot)
