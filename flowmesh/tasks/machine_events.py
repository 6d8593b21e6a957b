"""Events: what can happen to a task. The executor reports them to the state machine; see `machine` for the diagram."""

from __future__ import annotations

import msgspec

from flowmesh.messages.job import Exit, Outcome
from flowmesh.tasks.verdicts import Kind, Stop


class SlotGranted(msgspec.Struct, frozen=True):
    """The task is the next one of its slot."""


class Launched(msgspec.Struct, frozen=True):
    """The fork server has forked the task's process."""


class LaunchFailed(msgspec.Struct, frozen=True):
    """No process was forked, and another try on this node would fail too."""

    message: str
    kind: Kind = Kind.NODE_FAULT


class NeverForked(msgspec.Struct, frozen=True):
    """No process was forked: the fork server does not know the task (after a restart), or was not asked for it."""


class StopRequested(msgspec.Struct, frozen=True):
    """A cancel, a timeout, a drain or a fault ends the task."""

    reason: Stop
    detail: str = ""
    """One line for the verdict; empty: the reason's own name."""
    checkpoint: bool = False
    """Ask the runner to save a checkpoint first."""
    force: bool = False
    """SIGKILL at once, without the cancel frame and SIGTERM."""


class GraceOver(msgspec.Struct, frozen=True):
    """The grace period of the current stop level has passed."""


class ChildGone(msgspec.Struct, frozen=True):
    """The child has exited, and no process of its tree is left."""

    exit: Exit
    outcome: Outcome | None
    gpu_fault: str = ""
    """What the driver reported about the task's GPUs while it ran."""
    finished_frame: bool = False
    """Whether the child said that its outcome is in the spool folder."""


class ChildLost(msgspec.Struct, frozen=True):
    """The child is gone and its exit status is unknown: its fork server, or the previous supervisor, died."""

    message: str
    outcome: Outcome | None = None
    kind: Kind = Kind.NODE_FAULT


class Released(msgspec.Struct, frozen=True):
    """The task's GPUs are proven free, or its slot is quarantined: either way the task holds them no longer."""


class Delivered(msgspec.Struct, frozen=True):
    """Delivery has ended."""

    error: str = ""
    """Why the results did not reach their destination; empty: they did."""


Event = (
    SlotGranted
    | Launched
    | LaunchFailed
    | NeverForked
    | StopRequested
    | GraceOver
    | ChildGone
    | ChildLost
    | Released
    | Delivered
)
