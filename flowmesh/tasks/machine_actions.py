"""Actions: what the state machine tells the executor to do; see `machine` for the diagram."""

from __future__ import annotations

import enum

import msgspec

from flowmesh.tasks.verdicts import Verdict


class Level(enum.IntEnum):
    """How hard a task has been asked to stop."""

    NONE = 0
    ASK = 1
    """The cancel frame."""
    TERM = 2
    """SIGTERM."""
    KILL = 3
    """SIGKILL."""


class Launch(msgspec.Struct, frozen=True):
    """Have the fork server fork the task's process."""


class AnnounceStarted(msgspec.Struct, frozen=True):
    """Journal the start, and publish TASK_STARTED."""


class AskToStop(msgspec.Struct, frozen=True):
    """Send the cancel frame over the child's pipe."""

    reason: str
    checkpoint: bool


class Terminate(msgspec.Struct, frozen=True):
    """Send SIGTERM to the task's process group."""


class KillTree(msgspec.Struct, frozen=True):
    """Send SIGKILL to every process of the task."""


class ArmGrace(msgspec.Struct, frozen=True):
    """Start this level's grace period; GraceOver follows."""

    level: Level


class Release(msgspec.Struct, frozen=True):
    """Prove that the task's GPUs are free; Released follows."""


class LeaveQueue(msgspec.Struct, frozen=True):
    """Take the task out of its slot's queue."""


class Requeue(msgspec.Struct, frozen=True):
    """Give the slot back, and put the task at the head of its queue."""


class FreeSlot(msgspec.Struct, frozen=True):
    """Give the slot to the next task."""


class Deliver(msgspec.Struct, frozen=True):
    """Write the result (or the failure) and the manifest, and upload; Delivered follows."""


class AbortDelivery(msgspec.Struct, frozen=True):
    """Stop the upload; Delivered follows, with an error."""


class Finish(msgspec.Struct, frozen=True):
    """Journal the verdict and its terminal event in one transaction."""

    verdict: Verdict


Action = (
    Launch
    | AnnounceStarted
    | AskToStop
    | Terminate
    | KillTree
    | ArmGrace
    | Release
    | LeaveQueue
    | Requeue
    | FreeSlot
    | Deliver
    | AbortDelivery
    | Finish
)
