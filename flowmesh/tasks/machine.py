"""The state machine of a task, as a pure function: (state, event) → (state, actions). No I/O, no clock.

The executor carries the actions out and reports what happens as events. `|` separates what depends on the details;
tests/unit/tasks/test_machine_diagram.py compares the diagram with `step`.

    accepted ------------------------> QUEUED

    QUEUED -------- SlotGranted -----> LAUNCHING    Launch
      '------------ StopRequested ---> DELIVERING   LeaveQueue, Deliver

    LAUNCHING ----- Launched --------> RUNNING      AnnounceStarted
      |------------ NeverForked -----> QUEUED       Requeue
      |------------ StopRequested ---> STOPPING     (the child cannot receive anything yet)
      |------------ LaunchFailed ----> RELEASING    Release
      |------------ ChildGone -------> RELEASING    Release
      '------------ ChildLost -------> RELEASING    Release

    RUNNING ------- StopRequested ---> STOPPING     AskToStop, ArmGrace | KillTree
      |------------ ChildGone -------> RELEASING    Release
      '------------ ChildLost -------> RELEASING    Release

    STOPPING ------ Launched --------> STOPPING     AnnounceStarted, AskToStop, ArmGrace | AnnounceStarted, KillTree
      |------------ GraceOver -------> STOPPING     Terminate, ArmGrace | KillTree
      |------------ StopRequested ---> STOPPING     KillTree
      |------------ NeverForked -----> RELEASING    Release
      |------------ LaunchFailed ----> RELEASING    Release
      |------------ ChildGone -------> RELEASING    Release
      '------------ ChildLost -------> RELEASING    Release

    RELEASING ----- Released --------> DELIVERING   FreeSlot, Deliver

    DELIVERING ---- Delivered -------> DONE         Finish
      '------------ StopRequested ---> DELIVERING   AbortDelivery

Where they are not drawn, StopRequested and GraceOver change nothing (the task was already stopping, or had ended);
every other event raises InvalidTransition.

Promises, each with a property test: an accepted task finishes exactly once; its slot is given back exactly once, and
only when no process of the task is left; nothing is delivered before that.
"""

from __future__ import annotations

import enum

import msgspec

from flowmesh.errors import FlowMeshError
from flowmesh.messages.job import Exit
from flowmesh.tasks.machine_actions import (
    AbortDelivery,
    Action,
    AnnounceStarted,
    ArmGrace,
    AskToStop,
    Deliver,
    Finish,
    FreeSlot,
    KillTree,
    Launch,
    LeaveQueue,
    Level,
    Release,
    Requeue,
    Terminate,
)
from flowmesh.tasks.machine_events import (
    ChildGone,
    ChildLost,
    Delivered,
    Event,
    GraceOver,
    Launched,
    LaunchFailed,
    NeverForked,
    Released,
    SlotGranted,
    StopRequested,
)
from flowmesh.tasks.verdicts import Kind, Stop, Verdict, judge, stopped

__all__ = [
    "AbortDelivery",
    "Action",
    "AnnounceStarted",
    "ArmGrace",
    "AskToStop",
    "ChildGone",
    "ChildLost",
    "Deliver",
    "Delivered",
    "Event",
    "Finish",
    "FreeSlot",
    "GraceOver",
    "InvalidTransition",
    "KillTree",
    "Launch",
    "LaunchFailed",
    "Launched",
    "LeaveQueue",
    "Level",
    "NeverForked",
    "Release",
    "Released",
    "Requeue",
    "SlotGranted",
    "State",
    "StopRequested",
    "Task",
    "Terminate",
    "step",
]


class State(enum.StrEnum):
    QUEUED = "queued"
    """Accepted; waits for its slot."""
    LAUNCHING = "launching"
    """Has its slot; its process is being forked."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to stop; its processes are not gone yet."""
    RELEASING = "releasing"
    """No process is left; its GPUs are not proven free yet."""
    DELIVERING = "delivering"
    """The slot is free; results are being written and uploaded."""
    DONE = "done"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """All that the machine knows of a task. Journalled, so fields keep their names."""

    state: State = State.QUEUED
    launched: bool = False
    """Its process was forked, and its start announced."""
    stop: Stop | None = None
    """Why it was stopped; the first reason stands."""
    stop_detail: str = ""
    checkpoint: bool = False
    level: Level = Level.NONE
    verdict: Verdict | None = None


class InvalidTransition(FlowMeshError):
    """Raised when a state cannot have this event. A bug of the node, never of a task."""

    def __init__(self, task: Task, event: Event) -> None:
        super().__init__(f"a {task.state} task cannot take {event!r}")


def step(task: Task, event: Event) -> tuple[Task, list[Action]]:
    """The task after `event`, and what is to be done.

    Raises:
        InvalidTransition: the diagram has no such event in this state.
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
            # The stop was requested while the process was being forked: now the child can receive it.
            return _to(task, launched=True), [AnnounceStarted(), *_ask(task)]
        case LaunchFailed() if task.state in (State.LAUNCHING, State.STOPPING):
            verdict = Verdict(kind=event.kind, message=event.message)
            if task.stop is not None:
                verdict = stopped(task.stop, task.stop_detail)
            return _to(task, state=State.RELEASING, verdict=verdict), [Release()]
        case NeverForked() if task.state is State.STOPPING and not task.launched:
            return step(task, LaunchFailed("stopped before it was started"))
        case NeverForked() if task.state is State.LAUNCHING:
            return _to(task, state=State.QUEUED), [Requeue()]
        case ChildGone() if task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING):
            verdict = judge(
                event.exit,
                event.outcome,
                task.stop,
                stop_detail=task.stop_detail,
                gpu_fault=event.gpu_fault,
                finished_frame=event.finished_frame,
            )
            return _to(task, state=State.RELEASING, verdict=verdict), [Release()]
        case ChildLost() if task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING):
            return _to(task, state=State.RELEASING, verdict=_lost(task, event)), [Release()]
        case Released() if task.state is State.RELEASING:
            return _to(task, state=State.DELIVERING), [FreeSlot(), Deliver()]
        case Delivered() if task.state is State.DELIVERING:
            assert task.verdict is not None, "a task is delivered only after its verdict"
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
            verdict = stopped(event.reason, event.detail)
            return _to(asked, state=State.DELIVERING, verdict=verdict), [LeaveQueue(), Deliver()]
        case State.LAUNCHING | State.RUNNING:
            stopping = _to(asked, state=State.STOPPING, level=Level.KILL if event.force else Level.ASK)
            # A child that is being forked has no pipe yet: it is asked when Launched arrives.
            return stopping, _ask(stopping) if task.state is State.RUNNING else []
        case State.STOPPING if event.force and task.level < Level.KILL:
            killing = _to(task, level=Level.KILL)
            return killing, [KillTree()]
        case State.DELIVERING if event.reason is Stop.CANCEL and task.verdict is not None and task.verdict.ok:
            return asked, [AbortDelivery()]
        case _:  # already stopping, or nothing is left to stop: the first reason stands
            return task, []


def _ask(task: Task) -> list[Action]:
    if task.level >= Level.KILL:
        return [KillTree()]
    return [AskToStop(task.stop_detail or str(task.stop), task.checkpoint), ArmGrace(Level.ASK)]


def _escalate(task: Task) -> tuple[Task, list[Action]]:
    if task.state is not State.STOPPING:
        return task, []  # it ended within its grace period
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
        return stopped(task.stop, task.stop_detail, evidence=event.message)
    if event.outcome is not None:
        return judge(Exit(code=1), event.outcome, None)
    return Verdict(kind=event.kind, message=event.message)


def _to(task: Task, **changes: object) -> Task:
    return msgspec.structs.replace(task, **changes)
