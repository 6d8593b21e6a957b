"""A submitted pipeline, shown as a live tree until it has ended: what its driver says of the stages is in Redis."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TextIO

from flowmesh.cli import render
from flowmesh.cli.documents import Submission
from flowmesh.cli.pipelines.run import print_stages
from flowmesh.cli.pipelines.tree import tree_for
from flowmesh.client import Client, End, StageState
from flowmesh.errors import BusyError, UnavailableError
from flowmesh.pipelines.document import read
from flowmesh.pipelines.parts import Part
from flowmesh.pipelines.progress import StageRun, State

POLL_S = 0.5
"""Between two looks at the stages."""
END_S = 60.0
"""How long the end of a pipeline whose record is gone is looked for."""
_STATES = frozenset(state.value for state in State)


def follow(
    client: Client, submission: Submission, stream: TextIO | None, timeout_s: float | None, *, as_json: bool
) -> End:
    """Show a pipeline until it has ended; prints its stages then.

    Args:
        stream: where progress is shown; None: nowhere.

    Raises:
        BusyError: it has not ended in time; it continues.
        UnknownTask: its record is gone.
    """
    pipeline = read(submission.document)
    runs = {stage.name: StageRun(stage=stage) for stage in pipeline.stages}
    view = tree_for(stream)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    down = False
    view.begin(pipeline, runs)
    try:
        while True:
            if deadline is not None and time.monotonic() > deadline:
                raise BusyError(f"{submission.task_id} has not ended after {timeout_s:g} s; it continues")
            try:
                state = client.state(submission.task_id)
                seen = client.stages(submission.task_id)
            except UnavailableError as error:
                if not down:
                    view.note(f"{error}; waiting for it")
                down = True
            else:
                down = False
                for run in update(runs, seen):
                    view.changed(run)
                if state is None or state.ended:
                    end = client.wait(submission.task_id, END_S)
                    break
            time.sleep(POLL_S)
    finally:
        view.end()
    if not as_json:
        print_stages(pipeline, runs)
    return end


def update(runs: Mapping[str, StageRun], seen: Mapping[str, StageState]) -> list[StageRun]:
    """Take over what is known of the stages; returns those that have changed."""
    changed = []
    now, now_s = time.time(), time.monotonic()
    for name, state in seen.items():
        run = runs.get(name)
        if run is None or state.state not in _STATES:
            continue
        before = run.state, run.merged_into, run.error
        run.state = State(state.state)
        run.merged_into, run.error, run.verdict, run.worker = (
            state.merged_into, state.error, state.verdict, state.worker,
        )  # fmt: skip
        run.seconds = state.seconds
        run.started = None if state.started is None else now_s - max(0.0, now - state.started)
        run.parts = [Part(stage=name, task_id=task_id, spec={}) for task_id in state.task_ids]
        run.seen = f"on {state.worker}" if state.worker else ""
        if before != (run.state, run.merged_into, run.error):
            changed.append(run)
    return changed


def followed_by(task_id: str, count: int) -> str:
    """What is printed of a pipeline that was submitted."""
    return (
        f"{task_id}  pipeline of {render.count(count, 'stage')}  submitted; follow it with "
        f"`flowmesh logs -f {task_id}` or `flowmesh wait {task_id}`"
    )
