"""A task's life as a pure function: (state, event) → (state, actions). No I/O, no clock; the supervisor acts.

Promises, each tested by properties: a task that was accepted finishes exactly once; the slot is given back exactly
once, and only when no process of the task is left; nothing is delivered before that.
"""

from __future__ import annotations

import enum

import msgspec

from flowmesh.errors import FlowMeshError
from flowmesh.messages.job import Exit, Outcome
from flowmesh.tasks.verdicts import Kind, Stop, Verdict, judge


class State(enum.StrEnum):
    QUEUED = "queued"
    """Accepted; waits for its slot."""
    LAUNCHING = "launching"
    """Has its slot; its process is being made."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to stop, and not gone yet."""
    RELEASING = "releasing"
    """No process is left; its GPUs are not proven free yet."""
    DELIVERING = "delivering"
    """The slot is free; results are on their way."""
    DONE = "done"


class Level(enum.IntEnum):
    """How hard a task has been asked to stop."""

    NONE = 0
    ASK = 1
    TERM = 2
    KILL = 3


class Task(msgspec.Struct, frozen=True, kw_only=True):
    state: State = State.QUEUED
    launched: bool = False
    """Its process was made, and its start announced."""
    stop: Stop | None = None
    stop_detail: str = ""
    checkpoint: bool = False
    level: Level = Level.NONE
    verdict: Verdict | None = None


# ---- events ----------------------------------------------------------------------------------------------------------


class SlotGranted(msgspec.Struct, frozen=True):
    pass


class Launched(msgspec.Struct, frozen=True):
    pass


class LaunchFailed(msgspec.Struct, frozen=True):
    message: str
    kind: Kind = Kind.NODE_FAULT


class NeverForked(msgspec.Struct, frozen=True):
    """Nothing of it has run: its fork server does not know it (after a restart), or was not asked for it."""


class StopRequested(msgspec.Struct, frozen=True):
    reason: Stop
    detail: str = ""
    checkpoint: bool = False
    force: bool = False


class GraceOver(msgspec.Struct, frozen=True):
    """The time between two steps of an escalation has passed."""


class ChildGone(msgspec.Struct, frozen=True):
    """The child has ended and no process of its tree is left."""

    exit: Exit
    outcome: Outcome | None
    gpu_fault: str = ""
    """What the driver reported of its GPUs while it ran."""


class ChildLost(msgspec.Struct, frozen=True):
    """The child is gone and its exit status with it: its fork server, or the supervisor before us, died."""

    message: str
    outcome: Outcome | None = None
    kind: Kind = Kind.NODE_FAULT


class Released(msgspec.Struct, frozen=True):
    """The task's GPUs are free again, or their slot is quarantined: either way they are no longer this task's."""


class Delivered(msgspec.Struct, frozen=True):
    error: str = ""
    """Why it did not reach its destination; empty where it did."""


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


# ---- actions ---------------------------------------------------------------------------------------------------------


class Launch(msgspec.Struct, frozen=True):
    pass


class AnnounceStarted(msgspec.Struct, frozen=True):
    pass


class AskToStop(msgspec.Struct, frozen=True):
    """Send the cancel frame."""

    reason: str
    checkpoint: bool


class Terminate(msgspec.Struct, frozen=True):
    """SIGTERM to the task's group."""


class KillTree(msgspec.Struct, frozen=True):
    """SIGKILL to every process of the task."""


class ArmGrace(msgspec.Struct, frozen=True):
    """Let GraceOver come after this level's grace."""

    level: Level


class Release(msgspec.Struct, frozen=True):
    """Prove that the task's GPUs are free, then say Released."""


class LeaveQueue(msgspec.Struct, frozen=True):
    pass


class Requeue(msgspec.Struct, frozen=True):
    """Give the slot back, and wait for it anew as the first one."""


class FreeSlot(msgspec.Struct, frozen=True):
    pass


class Deliver(msgspec.Struct, frozen=True):
    """Write the result (or the failure) and its manifest, and send what must be sent."""


class AbortDelivery(msgspec.Struct, frozen=True):
    """Stop sending; Delivered comes with an error."""


class Finish(msgspec.Struct, frozen=True):
    """Journal the verdict together with its event."""

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


class InvalidTransition(FlowMeshError):
    """An event that this state cannot have. A bug of the node's, never of a task's."""

    def __init__(self, task: Task, event: Event) -> None:
        super().__init__(f"a {task.state} task cannot take {event!r}")


def step(task: Task, event: Event) -> tuple[Task, list[Action]]:
    """One step of a task's life.

    Raises:
        InvalidTransition: the event makes no sense in this state.
    """
    match event:
        case StopRequested():
            return _stop(task, event)
        case GraceOver():
            return _escalate(task)
        case SlotGranted() if task.state is State.QUEUED:
            return _to(task, state=State.LAUNCHING), [Launch()]
        case Launched() if task.state is State.LAUNCHING:
            return _to(task, state=State.RUNNING, launched=True), [AnnounceStarted()]
        case Launched() if task.state is State.STOPPING and not task.launched:
            # The stop came while the process was being made: it is said again, now that somebody can hear it.
            return _to(task, launched=True), [AnnounceStarted(), *_say(task)]
        case LaunchFailed() if task.state in (State.LAUNCHING, State.STOPPING):
            verdict = Verdict(kind=event.kind, message=event.message)
            if task.stop is not None:
                verdict = Verdict(kind=Kind(task.stop.value), message=task.stop_detail or task.stop.value)
            return _to(task, state=State.RELEASING, verdict=verdict), [Release()]
        case NeverForked() if task.state is State.STOPPING and not task.launched:
            return step(task, LaunchFailed("stopped before it was started"))
        case NeverForked() if task.state is State.LAUNCHING:
            return _to(task, state=State.QUEUED), [Requeue()]
        case ChildGone() if task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING):
            stop, detail, fault = task.stop, task.stop_detail, event.gpu_fault
            verdict = judge(event.exit, event.outcome, stop, stop_detail=detail, gpu_fault=fault)
            return _to(task, state=State.RELEASING, verdict=verdict), [Release()]
        case ChildLost() if task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING):
            return _to(task, state=State.RELEASING, verdict=_lost(task, event)), [Release()]
        case Released() if task.state is State.RELEASING:
            return _to(task, state=State.DELIVERING), [FreeSlot(), Deliver()]
        case Delivered() if task.state is State.DELIVERING:
            assert task.verdict is not None, "nothing is delivered without a verdict"
            verdict = task.verdict
            if event.error and verdict.ok:
                kind = Kind.DELIVERY_FAILED if task.stop is None else Kind(task.stop.value)
                verdict = Verdict(kind=kind, message=event.error, exit=verdict.exit)
            return _to(task, state=State.DONE, verdict=verdict), [Finish(verdict)]
        case _:
            raise InvalidTransition(task, event)


def _stop(task: Task, event: StopRequested) -> tuple[Task, list[Action]]:
    asked = _to(task, stop=event.reason, stop_detail=event.detail, checkpoint=event.checkpoint)
    match task.state:
        case State.QUEUED:
            verdict = Verdict(kind=Kind(event.reason.value), message=event.detail or event.reason.value)
            return _to(asked, state=State.DELIVERING, verdict=verdict), [LeaveQueue(), Deliver()]
        case State.LAUNCHING | State.RUNNING:
            stopping = _to(asked, state=State.STOPPING, level=Level.KILL if event.force else Level.ASK)
            # While the process is being made nobody can hear it: it is said when Launched comes.
            return stopping, _say(stopping) if task.state is State.RUNNING else []
        case State.STOPPING if event.force and task.level < Level.KILL:
            killing = _to(task, level=Level.KILL)
            return killing, [KillTree()]
        case State.DELIVERING if event.reason is Stop.CANCEL and task.verdict is not None and task.verdict.ok:
            return asked, [AbortDelivery()]
        case _:  # already stopping, or nothing is left to stop: the first word stands
            return task, []


def _say(task: Task) -> list[Action]:
    if task.level >= Level.KILL:
        return [KillTree()]
    return [AskToStop(task.stop_detail or str(task.stop), task.checkpoint), ArmGrace(Level.ASK)]


def _escalate(task: Task) -> tuple[Task, list[Action]]:
    if task.state is not State.STOPPING:
        return task, []  # it went before its grace was over
    match task.level:
        case Level.ASK:
            return _to(task, level=Level.TERM), [Terminate(), ArmGrace(Level.TERM)]
        case Level.TERM:
            return _to(task, level=Level.KILL), [KillTree()]
        case _:
            return task, [KillTree()]


def _lost(task: Task, event: ChildLost) -> Verdict:
    if event.outcome is not None and event.outcome.ok:
        return Verdict(kind=Kind.OK, evidence=event.message)
    if task.stop is not None:
        return Verdict(kind=Kind(task.stop.value), message=task.stop_detail or task.stop.value, evidence=event.message)
    if event.outcome is not None:
        return judge(Exit(code=1), event.outcome, None)
    return Verdict(kind=event.kind, message=event.message)


def _to(task: Task, **changes: object) -> Task:
    return msgspec.structs.replace(task, **changes)
