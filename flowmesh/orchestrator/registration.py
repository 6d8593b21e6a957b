"""How the node's workers stand in Redis: one presence a slot, which says what the slot does, and heals gaps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from loguru import logger

from flowmesh.bus.presence import Presence
from flowmesh.execution import task_events
from flowmesh.execution.observer import Hooks
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot

if TYPE_CHECKING:
    from flowmesh.control.operations import Operations
    from flowmesh.execution.executor import Executor
    from flowmesh.orchestrator.link import Uplink


class Workers(Hooks):
    """Hears of the executor what happens to tasks, and of Redis what happens to the connection."""

    executor: Executor
    """These three are set by the supervisor, which builds them with this one in hand."""
    uplink: Uplink
    operations: Operations

    def __init__(self) -> None:
        self.presences: dict[str, Presence] = {}
        self.subscribed = asyncio.Event()
        self._gaps: set[str] = set()
        """Workers that may have missed a dispatch, and have not re-announced themselves yet."""

    # ---- the node ----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Say of each slot with an adopted task that it is taken."""
        for worker_id, slot in self.executor.slots.items():
            if slot.current is not None:
                self.presences[worker_id].set_status("RUNNING", slot.current.task_id)

    def drain(self) -> None:
        for presence in self.presences.values():
            presence.set_status("DRAINING")

    async def unregister(self, timeout_s: float) -> None:
        await asyncio.gather(*(presence.unregister(timeout_s) for presence in self.presences.values()))

    # ---- Redis -------------------------------------------------------------------------------------------------------

    def on_subscribed(self, gap: bool) -> None:
        """We listen; after a gap, what was dispatched into it is to be queued again."""
        self.subscribed.set()
        for worker_id, slot in self.executor.slots.items():
            if gap:
                self._gaps.add(worker_id)
            if (slot.idle or slot.trouble) and slot.current is None:
                self._rest(slot)
            self._heal(slot)

    def on_events_sent(self, sent: list[bytes]) -> None:
        """The orchestrator sets a worker running when it dispatches, and idle when it sees a success.

        One that is busy by then says so again; and one that a failure is told of: perhaps nothing ran there.
        """
        ended = any(not task_events.is_start(event) for event in sent)
        failed = {task_events.failed_at(event) for event in sent}
        for worker_id, slot in self.executor.slots.items():
            if worker_id in failed or (ended and (slot.current is not None or slot.trouble)):
                self.presences[worker_id].restate()
            self._heal(slot)

    def _heal(self, slot: Slot[Run]) -> None:
        """After a gap in the subscription: have the orchestrator queue again what we missed.

        It queues all that we hold, too: so not before each task's end, delivered ones' included, has been told.
        """
        worker_id, executor = slot.plan.worker_id, self.executor
        if worker_id not in self._gaps or executor.draining is not None or not self.uplink.intake.up:
            return
        if not executor.holds(slot) and not executor.journal.outbox_size():
            self._gaps.discard(worker_id)
            logger.bind(worker=worker_id).info("announcing anew: a dispatch may have been missed")
            self.presences[worker_id].reannounce()

    def _rest(self, slot: Slot[Run], last: str | None = None) -> None:
        """Say what a slot without a task is; before we listen, not yet."""
        if self.executor.draining is None and self.subscribed.is_set():
            self.presences[slot.plan.worker_id].set_status("DEGRADED" if slot.trouble else "IDLE", last)

    # ---- the executor, see Hooks -------------------------------------------------------------------------------------

    def on_posted(self) -> None:
        self.uplink.outbox.wake()

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        if self.executor.draining is None:
            self.presences[slot.plan.worker_id].set_status("RUNNING", run.task_id)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        self._rest(slot, last.task_id)
        self._heal(slot)

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        if slot.current is None and slot.plan.worker_id in self.presences:
            self._rest(slot)

    def on_missed(self, slot: Slot[Run]) -> None:
        self._gaps.add(slot.plan.worker_id)
        self._heal(slot)

    def on_accepted(self, run: Run) -> None:
        self.operations.on_accepted(run)

    def on_refused(self, task_id: str, message: str) -> None:
        self.operations.on_refused(task_id, message)
