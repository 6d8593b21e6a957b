"""Tells when a slot of this node takes no tasks any more, and when it does again; each once, also over a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping

import msgspec

from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.redaction import Redactor
from flowmesh.reporting import webhook_message
from flowmesh.reporting.webhooks import Webhooks
from flowmesh.tasks.journal import Journal, JournalError

SETTLE_S = 1.0
"""A state that lasts for less is not told: a fault that its first probe ends."""
FACT = "closed_slots"
"""In the journal: the slots that were told closed, by worker id, with the reason."""


class SlotWatch(Observer):
    """
    Args:
        hides: knows the node's secrets.
        on_told: called when a notification was added.
    """

    def __init__(
        self,
        webhooks: Webhooks,
        journal: Journal,
        slots: Mapping[str, Slot[Run]],
        hides: Redactor,
        on_told: Callable[[], None],
    ) -> None:
        self._hides = hides
        self._webhooks = webhooks
        self._journal = journal
        self._slots = slots
        self._on_told = on_told
        self._closed: dict[str, str] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        with contextlib.suppress(JournalError, msgspec.DecodeError):
            told = msgspec.json.decode(journal.find_fact(FACT) or "{}", type=dict[str, str])
            self._closed = {worker_id: why for worker_id, why in told.items() if worker_id in slots}

    def look(self) -> None:
        """Compare all slots with what was told before the restart."""
        for slot in self._slots.values():
            self.on_slot_changed(slot)

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        worker_id = slot.plan.worker_id
        if (timer := self._timers.pop(worker_id, None)) is not None:
            timer.cancel()
        if bool(slot.trouble) != (worker_id in self._closed):
            self._timers[worker_id] = asyncio.get_running_loop().call_later(SETTLE_S, self._tell, slot)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:  # noqa: ARG002
        self.on_slot_changed(slot)

    def _tell(self, slot: Slot[Run]) -> None:
        worker_id, reason = slot.plan.worker_id, self._hides(slot.trouble)
        self._timers.pop(worker_id, None)
        if bool(reason) == (worker_id in self._closed):
            return
        closed = dict(self._closed)
        fault = closed.pop(worker_id, "")
        if reason:
            closed[worker_id] = reason
        event, body = webhook_message.of_slot(worker_id, reason, self._webhooks.node, fault=fault)
        try:
            with self._journal.transaction():
                if self._webhooks.wants(event):
                    for sending in self._webhooks.to_all(body):
                        self._journal.sendings.add(sending, must=True)
                self._journal.set_fact(FACT, msgspec.json.encode(closed).decode())
        except JournalError:  # its own fault closes the slots, and is told when it has ended
            self._timers[worker_id] = asyncio.get_running_loop().call_later(SETTLE_S, self._tell, slot)
            return
        self._closed = closed
        self._on_told()
