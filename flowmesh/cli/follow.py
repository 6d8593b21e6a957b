"""One task of `flowmesh run`: publishes it to the node and follows it to its end, over control socket and Redis."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh.cli import deployment, locate
from flowmesh.cli.control_types import Ended, Seen
from flowmesh.cli.deployment import TaskFailed
from flowmesh.cli.documents import Submission
from flowmesh.cli.local import LocalNode
from flowmesh.cli.signals import Interrupted, Signals
from flowmesh.cli.view import View
from flowmesh.errors import FlowMeshError, LaunchError
from flowmesh.messages import matching, wire

if TYPE_CHECKING:
    import redis

_FORCED_END_S = 10.0
_EVENT_GRACE_S = 3.0
_TICK_S = 0.1
_EXIT_WAIT_S = 2.0
"""Time for the node's exit to show after its control connection broke."""
_EXIT_POLL_S = 0.02


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a task, from the node's watch and the task's terminal event."""

    task_id: str
    task_type: str | None
    source: str
    worker_id: str
    ok: bool
    verdict: str | None = None
    error: str | None = None
    out_dir: str | None = None
    runtime_sec: float | None = None
    event: dict[str, Any] = {}
    """The payload of the terminal event."""
    result: Any = None
    """Content of responses.json, if the task succeeded."""


class Follow:
    """Publishes one task and follows it to its end."""

    def __init__(
        self,
        node: LocalNode,
        submission: Submission,
        worker: deployment.Worker,
        *,
        view: View,
        happened: queue.SimpleQueue[Any],
        signals: Signals,
        timeout_s: float | None,
    ) -> None:
        self._node = node
        self._submission = submission
        self._worker = worker
        self._view = view
        self._happened = happened
        self._signals = signals
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._give_up: float | None = None
        self._cancels = 0
        self._timed_out = False

    def run(self) -> Outcome:
        """Run the task.

        Raises:
            TaskFailed: the task needs more than this machine has, or its result cannot be read.
            Interrupted: the user gave up waiting.
            LaunchError: the node exited.
        """
        task_id = self._submission.task_id
        required = deployment.requirements_of(self._submission.document)
        if reasons := matching.match(self._worker.hardware or {}, required):
            raise TaskFailed(f"{self._submission.source} does not fit this machine: {'; '.join(reasons)}")
        self._signals.check()
        self._view.note(f"{task_id}  {self._submission.task_type or 'no task type'}  {self._submission.source}")
        with (
            locate.connected(self._node.redis_url) as client,
            deployment.subscribed(client, wire.TASK_EVENTS_CHANNEL) as events,
            self._node.control() as control,
        ):
            watcher = threading.Thread(target=self._watch, args=(control.watch(task_id),), daemon=True)
            watcher.start()
            try:
                client.publish("tasks", self._submission.dispatch(self._worker.worker_id))
                return self._follow(events)
            finally:
                control.interrupt()
                watcher.join()
                while not self._happened.empty():
                    self._happened.get()

    def _watch(self, seen: Iterator[Seen]) -> None:
        """Runs in a thread: forwards the node's events to the queue."""
        try:
            for event in seen:
                self._happened.put(event)
        except FlowMeshError as error:
            self._happened.put(error)

    def _follow(self, events: redis.client.PubSub) -> Outcome:
        end: deployment.TaskEnd | None = None
        ended: Ended | None = None
        patience: float | None = None  # when to stop waiting for the second of the two
        while True:
            match self._next():
                case Ended() as last:
                    ended = last
                case FlowMeshError() as error if ended is None and end is None:
                    self._lost(error)
                case msgspec.Struct() as event:
                    self._view.seen(event)  # type: ignore[arg-type]
            end = end or self._terminal(events)
            now = time.monotonic()
            if ended is not None or end is not None:
                patience = patience or now + _EVENT_GRACE_S
                if (ended is not None and end is not None) or now > patience:
                    return self._outcome(ended, end)
            elif self._give_up is not None and now > self._give_up:
                raise Interrupted(
                    self._signals.last, f"{self._submission.task_id} did not end after the cancel and was killed"
                )
            self._press(now)

    def _next(self) -> Any:
        try:
            return self._happened.get(timeout=_TICK_S)
        except queue.Empty:
            return None

    def _terminal(self, events: redis.client.PubSub) -> deployment.TaskEnd | None:
        while (message := events.get_message(timeout=0)) is not None:
            event = deployment.decode_event(message)
            if event is not None and (end := deployment.terminal_event(event, self._submission.task_id)):
                return end
        return None

    def _press(self, now: float) -> None:
        """Cancel the task on the timeout or the user's first signal; kill it on the second, give up on the third."""
        if self._deadline is not None and now > self._deadline and not self._timed_out:
            self._timed_out = True
            self._view.note(f"timeout after {self._timeout_s:g} s: cancelling")
            self._cancel(force=False)
        if self._signals.count == self._cancels:
            return
        self._cancels = self._signals.count
        if self._cancels == 1:
            self._view.note("cancelling (repeat to kill)")
            self._cancel(force=False)
        elif self._cancels == 2:
            self._view.note("killing the task")
            self._give_up = now + _FORCED_END_S
            self._cancel(force=True)
        else:
            self._give_up = now

    def _cancel(self, *, force: bool) -> None:
        try:
            with self._node.control() as control:
                control.cancel(self._submission.task_id, force=force)
        except FlowMeshError as error:  # the task may have ended meanwhile; its outcome follows
            self._view.note(f"the node refused the cancel: {error}")

    def _lost(self, error: FlowMeshError) -> None:
        """The watch ended early, which normally means that the node has exited."""
        deadline = time.monotonic() + _EXIT_WAIT_S
        while time.monotonic() < deadline:
            self._view.stop()
            self._node.raise_if_gone(f"while {self._submission.task_id} ran")
            time.sleep(_EXIT_POLL_S)
        self._node.show_log()
        raise LaunchError(f"the node no longer reports on {self._submission.task_id}: {error}; its log is above")

    def _outcome(self, ended: Ended | None, end: deployment.TaskEnd | None) -> Outcome:
        payload = end.payload if end is not None else {}
        kind = payload.get("error_kind")
        runtime = payload.get("runtime_sec")
        ok = end.ok if end is not None else bool(ended and ended.ok)
        error = (ended.error if ended is not None else None) or (end.error if end is not None else None)
        out_dir = ended.out_dir if ended is not None else None
        if self._timed_out and not ok:
            error = f"timeout after {self._timeout_s:g} s" + (f": {error}" if error else "")
        return Outcome(
            task_id=self._submission.task_id,
            task_type=self._submission.task_type,
            source=self._submission.source,
            worker_id=self._worker.worker_id,
            ok=ok,
            verdict=(ended.verdict if ended is not None else None) or (kind if isinstance(kind, str) else None),
            error=None if ok else error or "no reason given",
            out_dir=out_dir,
            runtime_sec=float(runtime) if isinstance(runtime, int | float) else None,
            event=payload,
            result=result_of(out_dir) if ok else None,
        )


def result_of(out_dir: str | None) -> Any:
    """The result in a task's folder; None if there is none.

    Raises:
        TaskFailed: it cannot be read.
    """
    if out_dir is None:
        return None
    try:
        return json.loads(Path(out_dir, "responses.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TaskFailed(f"{Path(out_dir, 'responses.json')} cannot be read: {error}") from None
