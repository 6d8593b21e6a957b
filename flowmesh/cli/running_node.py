"""A task on the node that runs on this machine already, over its control socket."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh.cli import locate
from flowmesh.cli.control import Control, NotPermitted
from flowmesh.cli.control_types import Ended, Seen
from flowmesh.cli.documents import Submission
from flowmesh.cli.follow import Outcome, result_of
from flowmesh.cli.node_watch import NodeWatch
from flowmesh.cli.signals import Interrupted, Signals
from flowmesh.errors import ConfigError, FlowMeshError, UnavailableError
from flowmesh.settings import paths

_TICK_S = 0.2


def find(config: str | None, task_type: str | None) -> RunningNode | None:
    """The node on this machine, if one answers that this user may use and that offers a task type.

    Args:
        config: the node's file; None: the node has the default folder.
        task_type: None: any node.
    """
    try:
        settings = locate.settings(config)
        folder = paths.state_dir(settings, os.environ)
        with Control(folder) as control:
            status = control.status_json()
    except (NotPermitted, UnavailableError, ConfigError):
        return None
    offered = status.get("task_types")
    if status.get("draining") or (task_type is not None and isinstance(offered, list) and task_type not in offered):
        return None
    return RunningNode(folder, settings.processes.task_user)


class RunningNode:
    """
    Args:
        state_dir: the node's.
        task_user: the user that its tasks run as; None: its own.
    """

    def __init__(self, state_dir: Path, task_user: str | None) -> None:
        self.state_dir = state_dir
        self.task_user = task_user

    def run(
        self,
        submission: Submission,
        *,
        happened: queue.SimpleQueue[Any],
        signals: Signals,
        seen: Callable[[Seen], None] = lambda _: None,
        waits: Callable[[str, int], None] = lambda *_: None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Hand a task to the node, and follow it to its end.

        The first signal cancels it, the second kills it, the third gives up waiting.

        Args:
            waits: called with the worker, and how many tasks come first.
            timeout_s: cancel it after this time.

        Raises:
            Refused: the node does not take it.
            UnavailableError: the node is gone.
            Interrupted: the user gave up waiting; the node goes on.
        """
        watch = NodeWatch(self.state_dir, submission.task_id, submission.document, happened.put)
        waits(watch.taken.worker_id, watch.taken.waits)
        try:
            return self._follow(watch, submission, happened, signals, seen, timeout_s)
        finally:
            watch.close()

    def _follow(  # noqa: PLR0917
        self,
        watch: NodeWatch,
        submission: Submission,
        happened: queue.SimpleQueue[Any],
        signals: Signals,
        seen: Callable[[Seen], None],
        timeout_s: float | None,
    ) -> Outcome:
        pressed = 0
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        timed_out = ""
        while True:
            try:
                event = happened.get(timeout=_TICK_S)
            except queue.Empty:
                event = None
            match event:
                case Ended():
                    return _outcome(submission, watch.taken.worker_id, event, timed_out)
                case FlowMeshError():
                    raise UnavailableError(f"{event}; {submission.task_id} continues when the node is back")
                case None:
                    pass
                case _:
                    seen(event)
            if deadline is not None and time.monotonic() > deadline and not timed_out:
                timed_out = f"timeout after {timeout_s:g} s"
                watch.cancel(force=False)
            if signals.count > pressed:
                pressed = signals.count
                if pressed > 2:
                    raise Interrupted(signals.last, f"gave up waiting; {submission.task_id} is still on the node")
                watch.cancel(force=pressed > 1)


def _outcome(submission: Submission, worker_id: str, ended: Ended, timed_out: str) -> Outcome:
    runtime = ended.payload.get("runtime_sec")
    return Outcome(
        task_id=submission.task_id,
        task_type=submission.task_type,
        source=submission.source,
        worker_id=worker_id,
        ok=ended.ok,
        verdict=ended.verdict,
        error=None if ended.ok else ": ".join(filter(None, (timed_out, ended.error))) or "no reason given",
        out_dir=ended.out_dir,
        runtime_sec=float(runtime) if isinstance(runtime, int | float) else None,
        event=ended.payload,
        result=result_of(ended.out_dir) if ended.ok else None,
    )
