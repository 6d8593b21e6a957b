"""What the parts of the executor may ask of it, as callables: no part gets the executor itself."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.tasks import machine
from flowmesh.tasks.history import Found
from flowmesh.tasks.sendings_table import Sending

PostEvent = Callable[[Run, machine.Event], None]
"""Apply an event to a run's state machine, at once."""

Pump = Callable[[Slot[Run]], None]
"""Give a slot that is free to the next task that waits for it."""

Work = Coroutine[Any, Any, machine.Event | None]
"""Something that takes its time; the event that it returns is applied to the run it was begun for."""

SendingsOf = Callable[[Found], Sequence[Sending]]
"""What is sent to webhooks and trace collectors about a task that has ended."""


class Begin(Protocol):
    def __call__(self, work: Work, run: Run | None = None) -> None:
        """Run this beside the loop's callbacks.

        An unhandled error is logged; a run then goes on with the event that the error means for its state.
        """


class Ports(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """All that the executor offers to its parts."""

    post: PostEvent
    begin: Begin
    pump: Pump
    on_fault_over: Callable[[str], None]
    """A fault of the node, by its name, is over."""
    check_idle: Callable[[], None]
    """Something has ended that the end of the node waits for."""
