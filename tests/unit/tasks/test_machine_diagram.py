"""The diagram in `flowmesh.tasks.machine` shows every transition that `step` has, and no other."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import get_args

from flowmesh.messages.job import Exit, Outcome
from flowmesh.tasks import machine
from flowmesh.tasks.machine import InvalidTransition, State, Task, step
from flowmesh.tasks.verdicts import Stop

Edge = tuple[str, str, str]
"""State, event, next state."""

ROW = re.compile(
    r"^    (?:(?P<state>[A-Z]+)|  [|'])-* ?-+ (?P<event>[A-Z]\w+) -+> (?P<next>[A-Z]+)(?: +(?P<actions>.*))?$"
)
EVENTS: list[machine.Event] = [
    machine.SlotGranted(),
    machine.Launched(),
    machine.LaunchFailed("no"),
    machine.NeverForked(),
    *(machine.StopRequested(reason, force=force) for reason in Stop for force in (False, True)),
    machine.GraceOver(),
    machine.ChildGone(Exit(code=0), Outcome(attempt=1, ok=True)),
    machine.ChildGone(Exit(signal=9), None),
    machine.ChildLost("the fork server died"),
    machine.ChildLost("the fork server died", Outcome(attempt=1, ok=True)),
    machine.Released(),
    machine.Delivered(),
    machine.Delivered("refused"),
]


def drawn() -> dict[Edge, set[str]]:
    """What the diagram shows: by edge, the alternatives of its actions."""
    edges: dict[Edge, set[str]] = {}
    state = ""
    for line in (machine.__doc__ or "").splitlines():
        row = ROW.match(line)
        if row is None:
            continue
        state = row["state"] or state
        actions = row["actions"] or ""
        edge = (state, row["event"], row["next"])
        assert edge not in edges, f"drawn twice: {edge}"
        edges[edge] = {""} if actions.startswith("(") else {one.strip() for one in actions.split("|")}
    return edges


def walked() -> tuple[dict[Edge, set[str]], dict[str, set[str]]]:
    """What `step` does, from every task that can be reached; and the events that each state takes without a change."""
    edges: dict[Edge, set[str]] = defaultdict(set)
    ignored: dict[str, set[str]] = defaultdict(set)
    reached, waiting = set(), [Task()]
    while waiting:
        task = waiting.pop()
        if repr(task) in reached:
            continue
        reached.add(repr(task))
        for event in EVENTS:
            name = type(event).__name__
            try:
                after, actions = step(task, event)
            except InvalidTransition:
                continue
            if after == task and not actions:
                ignored[task.state.name].add(name)
                continue
            edges[task.state.name, name, after.state.name].add(", ".join(type(action).__name__ for action in actions))
            waiting.append(after)
    return dict(edges), ignored


def test_the_diagram_shows_every_transition_with_its_actions_and_no_other() -> None:
    assert drawn() == walked()[0]


def test_the_diagram_names_every_state_event_and_action() -> None:
    edges = drawn()
    assert {state for edge in edges for state in (edge[0], edge[2])} == {state.name for state in State}
    assert {edge[1] for edge in edges} == {event.__name__ for event in get_args(machine.Event)}
    actions = {name for alternatives in edges.values() for one in alternatives for name in one.split(", ") if name}
    assert actions == {action.__name__ for action in get_args(machine.Action)}


def test_only_stops_and_grace_timers_may_come_at_any_time() -> None:
    edges, ignored = walked()
    anywhere = {"StopRequested", "GraceOver"}
    assert set().union(*ignored.values()) <= anywhere
    for state in State:
        taken = {event for source, event, _ in edges if source == state.name} | ignored[state.name]
        assert anywhere <= taken
