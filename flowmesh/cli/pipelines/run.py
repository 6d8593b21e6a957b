"""One pipeline of `flowmesh run`: its stages on a node of this machine, shown while they run."""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from flowmesh.cli import render
from flowmesh.cli.deployment import TaskFailed
from flowmesh.cli.documents import Submission
from flowmesh.cli.pipelines.node_port import NodePort
from flowmesh.cli.pipelines.rows import lines, rows, tree_order
from flowmesh.cli.pipelines.tree import drawn, tree_for
from flowmesh.cli.signals import Interrupted, Signals
from flowmesh.client.pipelines import LONGEST_ID
from flowmesh.errors import FlowMeshError, UnavailableError
from flowmesh.messages.wire import usable_task_id
from flowmesh.pipelines.document import Pipeline, read
from flowmesh.pipelines.driver import Driver
from flowmesh.pipelines.progress import StageRun, State
from flowmesh.pipelines.store import FolderStore


class PipelineRun:
    """
    Args:
        results_dir: the node's; the pipeline's own folder is in it.
        check: raises FlowMeshError where the node is known to be gone.
        stream: where progress is shown; None: nowhere.
    """

    def __init__(
        self,
        submission: Submission,
        state_dir: Path,
        results_dir: Path,
        *,
        happened: queue.SimpleQueue[Any],
        signals: Signals,
        stream: TextIO | None,
        timeout_s: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if usable_task_id(submission.task_id) is None or len(submission.task_id) > LONGEST_ID:
            raise TaskFailed(f"--task-id: a pipeline's id has at most {LONGEST_ID} characters")
        self._submission = submission
        self._state_dir = state_dir
        self._folder = results_dir / submission.task_id
        self._happened = happened
        self._signals = signals
        self._view = tree_for(stream)
        self._check = check
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timed_out = False
        self._pressed = 0
        self._again = f"run it again with --task-id {submission.task_id} to go on"

    def run(self, *, as_json: bool) -> FlowMeshError | None:
        """Run it and print the outcome; returns the error of a pipeline that failed.

        Raises:
            BusyError: it runs already.
            FlowMeshError: the node is gone.
            Interrupted: the user gave up waiting.
        """
        pipeline = read(self._submission.document)
        count = render.count(len(pipeline.stages), "stage")
        self._view.note(f"{self._submission.task_id}  pipeline of {count}  {self._submission.source}")
        with (
            FolderStore(self._folder) as store,
            NodePort(self._state_dir, self._happened, check=self._check, waits=self._waits) as port,
        ):
            driver = Driver(
                pipeline,
                self._submission.task_id,
                port,
                store,
                changed=self._view.changed,
                tick=lambda: self._press(driver),
            )
            self._view.begin(pipeline, driver.runs)
            try:
                result = driver.run()
            except Interrupted:
                raise
            except UnavailableError as error:
                raise UnavailableError(f"{error}; {self._again}") from None
            except BaseException:
                driver.stop()  # as far as the node still answers
                raise
            finally:
                self._view.end()
                while not self._happened.empty():
                    self._happened.get()
        if as_json:
            about = {
                "task_id": self._submission.task_id,
                "source": self._submission.source,
                "out_dir": str(self._folder),
            }
            render.print_json({**about, **result})
        else:
            print_stages(pipeline, driver.runs)
            print(f"results: {self._folder}")
        return self._error(driver.runs)

    def _waits(self, task_id: str, count: int) -> None:
        if count:
            self._view.note(f"{task_id} waits for {render.count(count, 'other task')} of the node")

    def _press(self, driver: Driver) -> None:
        """Cancel everything at the timeout or the first signal, kill it at the second, give up at the third."""
        if self._deadline is not None and time.monotonic() > self._deadline and not self._timed_out:
            self._timed_out = True
            self._view.note(f"timeout after {self._timeout_s:g} s: cancelling")
            driver.stop()
        if self._signals.count == self._pressed:
            return
        self._pressed = self._signals.count
        if self._pressed == 1:
            self._view.note("cancelling all stages (repeat to kill)")
            driver.stop()
        elif self._pressed == 2:
            self._view.note("killing all stages")
            driver.stop(force=True)
        else:
            raise Interrupted(self._signals.last, f"gave up waiting for {self._submission.task_id}")

    def _error(self, runs: dict[str, StageRun]) -> FlowMeshError | None:
        again = self._again
        if self._pressed:
            return Interrupted(self._signals.last, f"{self._submission.task_id} was interrupted; {again}")
        failed = [run for run in runs.values() if run.state is State.FAILED]
        if self._timed_out and not all(run.state.lets_others_run for run in runs.values()):
            return TaskFailed(f"{self._submission.task_id}: timeout after {self._timeout_s:g} s; {again}")
        if not failed:
            return None
        others = f" (and {render.count(len(failed) - 1, 'other stage')})" if len(failed) > 1 else ""
        error = TaskFailed.of(f"stage {failed[0].name}", failed[0].verdict, failed[0].error)
        return TaskFailed(f"{self._submission.task_id}: {error}{others}; {again}")


def print_stages(pipeline: Pipeline, runs: dict[str, StageRun]) -> None:
    """Print where the stages of a pipeline that has ended stand, and what failed."""
    order = tree_order(pipeline)
    if render.is_terminal(sys.stdout):
        from rich.console import Console

        Console(highlight=False).print(drawn(order, runs, render.width(sys.stdout) - 1))
    else:
        print("\n".join(lines(rows(order, runs), render.width(sys.stdout))))
    _print_failures(runs)


def _print_failures(runs: dict[str, StageRun]) -> None:
    """What the tree has no room for: the errors of all but the first failed stage, which ends the command, and logs."""
    failed = [run for run in runs.values() if run.state is State.FAILED]
    for number, run in enumerate(failed):
        if number:
            print(render.printable(f"{run.name}: {run.error}"))
        if run.out_dir is not None and (logs := Path(run.out_dir, "logs")).is_dir():
            print(f"logs of {run.name}: {logs}")
