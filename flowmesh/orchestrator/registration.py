"""The node's workers in Redis: one registration a slot, which follows the slot's state, and recovers from gaps."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Set

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import redis
from flowmesh.bus.presence import Presence
from flowmesh.execution import task_events
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.orchestrator.worker_description import NodeDescription, described_env, presence
from flowmesh.tasks.journal import JournalError

LONGEST_PAUSE_S = 60.0
"""Between two announcements of a worker that misses every dispatch."""


class Pause:
    """The growing pause between two announcements of one worker."""

    def __init__(self) -> None:
        self._backoff = Backoff(1.0, LONGEST_PAUSE_S)
        self._due = 0.0

    def left_s(self) -> float:
        """How long it still lasts; 0: it is over."""
        return max(0.0, self._due - time.monotonic())

    def start(self) -> None:
        now = time.monotonic()
        if now - self._due > 2 * LONGEST_PAUSE_S:
            self._backoff.reset()
        self._due = now + self._backoff.next_s()


CUT_SOON_S = 60.0
"""A subscription that breaks within this time after an announcement was perhaps cut by what that led to."""
FIRST_QUIET_S = 5.0
LONGEST_QUIET_S = 300.0
"""How long the next announcement waits then: doubled with each cut."""


class Registration(Observer):
    def __init__(self, node: NodeDescription, executor: Executor, client: redis.Redis) -> None:
        self.subscribed = asyncio.Event()
        """Set once the tasks channel was subscribed to for the first time."""
        self._node = node
        self._executor = executor
        self._listening = False
        self._new_owner = ""
        self._pauses: dict[str, Pause] = {}
        self._gaps: set[str] = set()
        """Workers that may have missed a dispatch, and were not announced again yet."""
        self._cuts = 0
        """How often in a row the subscription broke soon after a worker was announced again."""
        self._announced_at = 0.0
        """When that was last, monotonic."""
        self._quiet_until = 0.0
        self.presences: dict[str, Presence] = {
            worker_id: presence(
                node,
                executor,
                slot,
                client,
                on_missed=self.on_missed,
                on_rival=self._on_rival,
                on_copied=self._on_copied,
            )
            for worker_id, slot in executor.slots.items()
        }

    async def claim(self) -> None:
        """Take the worker ids. Raises BusyError where another live node has one."""
        await asyncio.gather(*(each.claim() for each in self.presences.values()))

    def _on_rival(self, slot: Slot[Run], reason: str) -> None:
        slot.displaced = reason
        self._executor.observers.on_slot_changed(slot)

    def _on_copied(self) -> str:
        """Another owner for a node that is the copy of another one; kept, so that its next start is refused."""
        if not self._new_owner:
            token = secrets.token_hex(8)
            with contextlib.suppress(JournalError):
                self._executor.journal.set_fact("owner", token)
            self._new_owner = f"{token}:{self._node.owner.partition(':')[2]}"
        return self._new_owner

    def resume(self) -> None:
        """Report the slots of adopted tasks as RUNNING, unless the node drains."""
        for worker_id, slot in self._executor.slots.items():
            if slot.current is not None and self._executor.draining is None:
                self.presences[worker_id].set_status("RUNNING", slot.current.task_id)

    def drain(self) -> None:
        for each in self.presences.values():
            each.set_status("DRAINING")

    def take_tasks_again(self) -> None:
        """After a drain that was taken back: what was dispatched meanwhile was not taken."""
        for slot in self._executor.slots.values():
            if slot.current is not None:
                self.presences[slot.plan.worker_id].set_status("RUNNING", slot.current.task_id)
            else:
                self._rest(slot)
            self.on_missed(slot)

    async def unregister(self, timeout_s: float, *, keep: Set[str] | None = None) -> None:
        """Unregister the workers.

        Args:
            keep: the workers that a next supervisor will have; those with tasks are kept, too. None: none.
        """
        gone = [
            presence
            for worker_id, presence in self.presences.items()
            if keep is None
            or (worker_id not in keep and not self._executor.runs.has_any_of(self._executor.slots[worker_id]))
        ]
        await asyncio.gather(*(each.unregister(timeout_s) for each in gone))

    @property
    def disabled(self) -> bool:
        """Whether elastic scaling has disabled all of the node's workers."""
        return all(each.disabled for each in self.presences.values())

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
        if executor.runs.has_any_of(slot) or executor.journal.outbox_size():
            return
        pause = self._pauses.setdefault(worker_id, Pause())
        quiet_s = self._quiet_until - time.monotonic()
        if (
            wait_s := max(pause.left_s(), quiet_s)
        ) > 0:  # a node that cannot take what it is given must not ask for it in a circle
            asyncio.get_running_loop().call_later(wait_s, self._heal, slot)
            return
        pause.start()
        self._gaps.discard(worker_id)
        self._announced_at = time.monotonic()
        logger.bind(worker=worker_id).info("announced again: a dispatch may have been missed")
        self.presences[worker_id].reannounce()

    def _rest(self, slot: Slot[Run], last: str | None = None) -> None:
        """Report a slot without a task, once dispatches can be received."""
        if self._executor.draining is None and self.subscribed.is_set():
            if reason := slot.trouble:
                self.presences[slot.plan.worker_id].set_status("DEGRADED", last, reason)
            else:
                self.presences[slot.plan.worker_id].set_status("IDLE", last)

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        if self._executor.draining is None:
            self.presences[slot.plan.worker_id].set_status("RUNNING", run.task_id)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        self._rest(slot, last.task_id)
        self._heal(slot)

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        if slot.current is None:
            self._rest(slot)

    def on_fault_changed(self) -> None:
        """Task types of an environment that does not work are not offered."""
        for each in self.presences.values():
            each.describe(msgspec.structs.replace(each.identity, env=described_env(self._node, self._executor)))

    def on_missed(self, slot: Slot[Run]) -> None:
        self._gaps.add(slot.plan.worker_id)
        self._heal(slot)
