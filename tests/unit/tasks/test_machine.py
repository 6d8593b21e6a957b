"""The state machine's promises, for every order of events that there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.messages.job import Exit, Fault, Outcome
from flowmesh.tasks import machine
from flowmesh.tasks.machine import InvalidTransition, Level, State, Task, step
from flowmesh.tasks.verdicts import Kind, Stop, Verdict

GOOD = machine.ChildGone(Exit(code=0), Outcome(attempt=1, ok=True))
BAD = machine.ChildGone(Exit(code=1), Outcome(attempt=1, ok=False, fault=Fault.BAD_REQUEST, message="no"))
KILLED = machine.ChildGone(Exit(signal=9), None)
EVENTS = [
    machine.SlotGranted(),
    machine.Launched(),
    machine.LaunchFailed("no"),
    machine.NeverForked(),
    machine.StopRequested(Stop.CANCEL),
    machine.StopRequested(Stop.TIMEOUT, "late"),
    machine.StopRequested(Stop.DRAIN, checkpoint=True),
    machine.StopRequested(Stop.CANCEL, force=True),
    machine.GraceOver(),
    GOOD,
    BAD,
    KILLED,
    machine.ChildLost("the server died"),
    machine.ChildLost("the server died", Outcome(attempt=1, ok=True)),
    machine.Released(),
    machine.Delivered(),
    machine.Delivered("refused"),
]


def walk(events: list[machine.Event]) -> tuple[Task, list[machine.Action]]:
    """Feed events; those that a state cannot have leave the task as it is, as the executor has it."""
    task, done = Task(), []
    for event in events:
        try:
            task, actions = step(task, event)
        except InvalidTransition:
            continue
        done += actions
    return task, done


def count(actions: list[machine.Action], kind: type) -> int:
    return sum(isinstance(action, kind) for action in actions)


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_whatever_happens_each_end_comes_at_most_once(events: list[machine.Event]) -> None:
    task, actions = walk(events)
    assert count(actions, machine.Finish) == (task.state is State.DONE)
    given_back = count(actions, machine.FreeSlot) + count(actions, machine.Requeue)
    assert given_back <= count(actions, machine.Launch) <= count(actions, machine.Requeue) + 1
    assert count(actions, machine.AnnounceStarted) <= 1
    assert count(actions, machine.FreeSlot) + count(actions, machine.LeaveQueue) <= 1
    assert count(actions, machine.Deliver) <= 1
    if task.state is State.DONE:
        assert task.verdict is not None
        assert count(actions, machine.FreeSlot) + count(actions, machine.LeaveQueue) == 1


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_from_anywhere_there_is_a_way_to_the_end(events: list[machine.Event]) -> None:
    task, _ = walk(events)
    way = [machine.SlotGranted(), machine.Launched(), KILLED, machine.Released(), machine.Delivered()]
    for event in way:
        try:
            task, _ = step(task, event)
        except InvalidTransition:
            continue
    assert task.state is State.DONE


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_nothing_is_delivered_while_a_process_may_be_there(events: list[machine.Event]) -> None:
    _, actions = walk(events)
    launched = count(actions, machine.Launch) - count(actions, machine.Requeue)
    if launched and count(actions, machine.Deliver):
        released = next(i for i, action in enumerate(actions) if isinstance(action, machine.Release))
        assert released < next(i for i, action in enumerate(actions) if isinstance(action, machine.Deliver))


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_stopping_only_ever_gets_harder(events: list[machine.Event]) -> None:
    task, level = Task(), Level.NONE
    for event in events:
        try:
            task, _ = step(task, event)
        except InvalidTransition:
            continue
        assert task.level >= level
        level = task.level


def running() -> Task:
    return walk([machine.SlotGranted(), machine.Launched()])[0]


def test_a_stop_escalates_frame_term_kill() -> None:
    task, actions = step(running(), machine.StopRequested(Stop.CANCEL, "enough"))
    assert actions == [machine.AskToStop("enough", checkpoint=False), machine.ArmGrace(Level.ASK)]
    task, actions = step(task, machine.GraceOver())
    assert actions == [machine.Terminate(), machine.ArmGrace(Level.TERM)]
    task, actions = step(task, machine.GraceOver())
    assert actions == [machine.KillTree()]
    task, _ = step(task, KILLED)
    assert task.verdict is not None
    assert task.verdict.kind is Kind.CANCELLED


def test_a_stop_while_the_process_is_made_is_said_when_somebody_hears_it() -> None:
    task, actions = walk([machine.SlotGranted(), machine.StopRequested(Stop.CANCEL)])
    assert actions == [machine.Launch()]
    _, actions = step(task, machine.Launched())
    assert actions[0] == machine.AnnounceStarted()
    assert isinstance(actions[1], machine.AskToStop)
    task, _ = step(task, machine.StopRequested(Stop.CANCEL, force=True))
    _, actions = step(task, machine.Launched())
    assert actions == [machine.AnnounceStarted(), machine.KillTree()]


def test_a_success_that_a_cancel_crossed_stays_a_success() -> None:
    task, _ = step(running(), machine.StopRequested(Stop.CANCEL))
    task, _ = step(task, GOOD)
    assert task.verdict is not None
    assert task.verdict.ok


def test_a_queued_task_is_cancelled_without_a_process() -> None:
    task, actions = step(Task(), machine.StopRequested(Stop.CANCEL, "enough"))
    assert actions == [machine.LeaveQueue(), machine.Deliver()]
    task, actions = step(task, machine.Delivered())
    assert actions == [machine.Finish(Verdict(kind=Kind.CANCELLED, message="enough"))]


def test_a_failed_delivery_is_the_verdict_and_a_cancelled_one_too() -> None:
    task, _ = walk([machine.SlotGranted(), machine.Launched(), GOOD, machine.Released()])
    failed, _ = step(task, machine.Delivered("500 from http://x"))
    assert failed.verdict is not None
    assert (failed.verdict.kind, failed.verdict.message) == (Kind.DELIVERY_FAILED, "500 from http://x")
    asked, actions = step(task, machine.StopRequested(Stop.CANCEL))
    assert actions == [machine.AbortDelivery()]
    cancelled, _ = step(asked, machine.Delivered("cancelled while delivering"))
    assert cancelled.verdict is not None
    assert cancelled.verdict.kind is Kind.CANCELLED


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (None, Kind.NODE_FAULT),
        (Outcome(attempt=1, ok=True), Kind.OK),
        (Outcome(attempt=1, ok=False, fault=Fault.GPU_OOM, message="CUDA out of memory"), Kind.GPU_OOM),
    ],
)
def test_what_a_lost_child_left_on_disk_counts(outcome: Outcome | None, kind: Kind) -> None:
    task, _ = step(running(), machine.ChildLost("its fork server died", outcome))
    assert task.verdict is not None
    assert task.verdict.kind is kind


def test_an_event_that_cannot_be_says_its_story() -> None:
    with pytest.raises(InvalidTransition, match=r"a queued task cannot take .*Released"):
        step(Task(), machine.Released())


def test_one_that_was_never_forked_waits_anew_unless_it_was_stopped_meanwhile() -> None:
    task, actions = walk([machine.SlotGranted(), machine.NeverForked()])
    assert (task.state, actions) == (State.QUEUED, [machine.Launch(), machine.Requeue()])
    task, actions = walk([machine.SlotGranted(), machine.StopRequested(Stop.CANCEL), machine.NeverForked()])
    assert (task.state, actions) == (State.RELEASING, [machine.Launch(), machine.Release()])
    assert task.verdict is not None
    assert task.verdict.kind is Kind.CANCELLED
