"""Runs a pipeline's tasks on a node of this machine, over its control socket."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from flowmesh.cli import control_types
from flowmesh.cli.control import Control
from flowmesh.cli.deployment import TaskFailed
from flowmesh.cli.follow import result_of
from flowmesh.cli.node_watch import NodeWatch
from flowmesh.cli.view import amount
from flowmesh.errors import FlowMeshError
from flowmesh.pipelines.ports import Ended, Event, Seen, Started, Task

_TICK_S = 0.1

Reported = tuple[str, control_types.Seen | FlowMeshError]


class NodePort:
    """
    Args:
        state_dir: the node's.
        happened: wakes `next`; None in it is no event.
        check: raises FlowMeshError where the node is known to be gone.
        waits: called with the number of other tasks that a task waits for.
    """

    def __init__(
        self,
        state_dir: Path,
        happened: queue.SimpleQueue[Any],
        *,
        check: Callable[[], None] = lambda: None,
        waits: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        self._state_dir = state_dir
        self._happened = happened
        self._check = check
        self._waits = waits
        self._watches: dict[str, NodeWatch] = {}
        with Control(state_dir) as control:
            workers = control.status().workers
        self._slots = max(1, sum(not worker.reason for worker in workers))

    def __enter__(self) -> NodePort:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for watch in self._watches.values():
            watch.close()

    def slots(self) -> int:
        return self._slots

    def submit(self, task: Task) -> bool:
        """See `Port.submit`.

        Raises:
            Refused: it fits no worker of the node, or the node takes no task now.
            UnavailableError: the node is gone.
        """
        if len(self._watches) >= self._slots:
            return False
        task_id = task.task_id

        def put(event: control_types.Seen | FlowMeshError) -> None:
            self._happened.put((task_id, event))

        watch = NodeWatch(self._state_dir, task_id, task.document, put, self._check)
        self._watches[task_id] = watch
        self._waits(task_id, watch.taken.waits)
        return True

    def cancel(self, task_id: str, *, force: bool) -> None:
        if (watch := self._watches.get(task_id)) is not None:
            watch.cancel(force=force)

    def next(self) -> Event | None:
        """See `Port.next`.

        Raises:
            FlowMeshError: the node is gone.
        """
        try:
            reported: Reported | None = self._happened.get(timeout=_TICK_S)
        except queue.Empty:
            return None
        if reported is None:
            return None
        task_id, event = reported
        match event:
            case FlowMeshError():
                raise event
            case control_types.Ended():
                if (watch := self._watches.pop(task_id, None)) is not None:
                    watch.close()
                return _ended(task_id, event)
            case control_types.StateSeen(state):
                return Started(task_id=task_id) if state == "running" else None
            case control_types.PhaseSeen(phase):
                return Seen(task_id=task_id, text=phase)
            case control_types.ProgressSeen():
                fraction = min(1.0, event.done / event.total) if event.total else None
                return Seen(task_id=task_id, text=amount(event), fraction=fraction)


def _ended(task_id: str, event: control_types.Ended) -> Ended:
    result: Any = None
    error = event.error
    ok = event.ok
    if ok:
        try:
            result = result_of(event.out_dir)
        except TaskFailed as unreadable:
            ok, error = False, str(unreadable)
    return Ended(
        task_id=task_id,
        ok=ok,
        verdict=event.verdict,
        error=None if ok else error or "no reason given",
        out_dir=event.out_dir,
        result=result if isinstance(result, dict) else None,
    )
