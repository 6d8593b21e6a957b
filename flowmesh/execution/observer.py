"""What the executor reports to the rest of the node while tasks come, run and end."""

from __future__ import annotations

from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.tasks.verdicts import Kind, Verdict


class Observer:
    """Overrides what it is interested in; the defaults do nothing. Called on the loop; must not raise."""

    def on_posted(self) -> None:
        """An event was added to the outbox."""

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        """A task has begun to use its slot."""

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        """The slot is free, and no task waits for it."""

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        """A fault that concerns the slot began, changed or ended; `slot.trouble` says what keeps it from tasks."""

    def on_fault_changed(self) -> None:
        """A fault of the node began or ended."""

    def on_missed(self, slot: Slot[Run]) -> None:
        """A dispatch was dropped without an event: the orchestrator should queue it again."""

    def on_ended(self, run: Run, verdict: Verdict) -> None:
        """A task's terminal event is in the journal."""

    def on_endpoint(self, run: Run) -> None:
        """A task has begun to serve a model, or has ended to: `run.endpoint`."""

    def on_accepted(self, run: Run) -> None:
        """A task was accepted and is in the journal."""

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:
        """A task was refused; `message` is the error of its event, `kind` its verdict."""


class Observers(Observer):
    """Several observers as one, called in the order in which they were added."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def on_posted(self) -> None:
        for each in self._observers:
            each.on_posted()

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        for each in self._observers:
            each.on_slot_taken(slot, run)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        for each in self._observers:
            each.on_slot_free(slot, last)

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        for each in self._observers:
            each.on_slot_changed(slot)

    def on_fault_changed(self) -> None:
        for each in self._observers:
            each.on_fault_changed()

    def on_missed(self, slot: Slot[Run]) -> None:
        for each in self._observers:
            each.on_missed(slot)

    def on_ended(self, run: Run, verdict: Verdict) -> None:
        for each in self._observers:
            each.on_ended(run, verdict)

    def on_endpoint(self, run: Run) -> None:
        for each in self._observers:
            each.on_endpoint(run)

    def on_accepted(self, run: Run) -> None:
        for each in self._observers:
            each.on_accepted(run)

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:
        for each in self._observers:
            each.on_refused(task_id, message, kind)
