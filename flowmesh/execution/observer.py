"""What the executor tells the rest of the node, and what it counts."""

from __future__ import annotations

from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot


class Hooks:
    """What the executor tells the rest of the node. The supervisor overrides; the defaults do nothing."""

    def on_posted(self) -> None:
        """Something is in the outbox."""

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        """A task has begun to use its slot."""

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        """The slot is free, and nobody waits for it."""

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        """The slot was closed (`slot.closed` says why), or is open again."""

    def on_missed(self, slot: Slot[Run]) -> None:
        """A dispatch could not be taken, and nobody was told: the orchestrator should queue it again."""

    def on_accepted(self, run: Run) -> None:
        """A task is ours from now on."""

    def on_refused(self, task_id: str, message: str) -> None:
        """A task was not accepted, and why."""


class Counters:
    """What happened since the node started; for `flowmesh status`."""

    def __init__(self) -> None:
        self.malformed = 0
        self.refused = 0
        self.duplicates = 0
        self.verdicts: dict[str, int] = {}
