"""Runs a pipeline's tasks on a node of this machine, over its control socket."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from flowmesh.cli import control_types
from flowmesh.cli.control import Control
from flowmesh.cli.deployment import TaskFailed
from flowmesh.cli.follow import result_of
from flowmesh.cli.view import amount
from flowmesh.errors import FlowMeshError, UnavailableError
from flowmesh.pipelines.ports import Ended, Event, Seen, Started, Task

_TICK_S = 0.1
GONE_AFTER_S = 10.0
"""A node that restarts closes its connections, and answers again within seconds."""
_RETRY_S = 0.1

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
        self._watches: dict[str, Control] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        with Control(state_dir) as control:
            workers = control.status().workers
        self._slots = max(1, sum(not worker.reason for worker in workers))

    def __enter__(self) -> NodePort:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed = True
        for watch in list(self._watches.values()):
            watch.interrupt()
        for thread in self._threads:
            thread.join()

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
        with self._control() as control:
            taken = control.submit(task.task_id, task.document)
        if taken.refused is not None:
            end = control_types.Ended(ok=False, verdict=taken.verdict, error=taken.refused)
            self._happened.put((task.task_id, end))
            return True
        self._waits(task.task_id, taken.waits)
        watch = self._watches[task.task_id] = self._control()
        thread = threading.Thread(target=self._watch, args=(task.task_id, watch), daemon=True)
        self._threads.append(thread)
        thread.start()
        return True

    def cancel(self, task_id: str, *, force: bool) -> None:
        try:
            with Control(self._state_dir) as control:
                control.cancel(task_id, force=force)
        except FlowMeshError:
            return  # it has ended meanwhile, or its watch tells that the node is gone

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
                self._watches.pop(task_id, None)
                return _ended(task_id, event)
            case control_types.StateSeen(state):
                return Started(task_id=task_id) if state == "running" else None
            case control_types.PhaseSeen(phase):
                return Seen(task_id=task_id, text=phase)
            case control_types.ProgressSeen():
                fraction = min(1.0, event.done / event.total) if event.total else None
                return Seen(task_id=task_id, text=amount(event), fraction=fraction)

    def _control(self) -> Control:
        """A connection, also to a node that is just restarting.

        Raises:
            UnavailableError: it is gone.
        """
        deadline = time.monotonic() + GONE_AFTER_S
        while True:
            self._check()
            try:
                return Control(self._state_dir)
            except UnavailableError:
                if self._closed or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)

    def _watch(self, task_id: str, watch: Control) -> None:
        """Runs in a thread: forwards a task's events, also over a restart of the node."""
        while True:
            try:
                with watch:
                    for event in watch.watch(task_id):
                        self._happened.put((task_id, event))
                return
            except UnavailableError:
                if self._closed:
                    return
            except FlowMeshError as error:
                self._happened.put((task_id, error))
                return
            try:
                watch = self._control()
                if task_id in self._watches:
                    self._watches[task_id] = watch
            except FlowMeshError as error:
                self._happened.put((task_id, error))
                return


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
