"""Keeps a served model at its address: starts the serving process, relays what it reports, and starts it again.

Address and key stay in the task's own process, which touches no model and no GPU. So each start is a fresh process, and
what an earlier one has left is gone before the next one loads.
"""

from __future__ import annotations

import secrets
import select
import socket
import time
from typing import Any

import msgspec

from flowmesh.messages.job import Fault, Outcome
from flowmesh.processes import linux
from flowmesh.processes.pipe import Frame, Phase, Progress, Serving
from runners.api import Cancelled, Context, RunnerError
from runners.serve.door import Door
from runners.serve.process import Place, Process, end_all, fork
from runners.serve.result import result_of
from runners.serve.task import ServeTask

POLL_S = 0.2
REPORT_S = 1.0
"""Between two frames that say that the model is not served now."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LEAST_SILENCE_S = 10.0
"""How long a serving process may say nothing, at least; else as long as three health checks are apart."""
FINAL = frozenset({Fault.BAD_REQUEST, Fault.MISSING_DEPENDENCY})
"""What another start would find again."""


class ServeFailed(RunnerError):
    """The serving process failed, and is not started again; with its own message and fault."""

    def __init__(self, outcome: Outcome, restarts: int) -> None:
        super().__init__(f"{outcome.message} (restarts: {restarts})" if restarts else outcome.message)
        self.fault = outcome.fault or Fault.ERROR
        self.says_all = not outcome.detail
        if outcome.detail:
            self.add_note(outcome.detail)


class Keeper:
    """
    Args:
        listener: bound already; its owner closes it.
    """

    def __init__(self, ctx: Context, task: ServeTask, listener: socket.socket) -> None:
        self._ctx = ctx
        self._task = task
        self._place = Place(listener=listener, key=secrets.token_urlsafe(32))
        self._door = Door(listener)
        self._last: Serving | None = None
        """What the serving process said last; `ready` while it serves."""
        self._said = 0.0
        self._heard = 0.0
        """When the serving process last said that it serves; 0: it does not, or ends."""
        self._restarts = 0

    def run(self) -> dict[str, Any]:
        """Serve until the end; returns the task's result.

        Raises:
            ServeFailed: the model is not served, and no restart is left, or would help.
            Cancelled: the node stopped the task for another reason than a cancel, or before the model was served.
        """
        linux.become_subreaper()
        try:
            while True:
                outcome = self._serve_once()
                self._ctx.warnings += [line for line in outcome.warnings if line not in self._ctx.warnings]
                if outcome.ok:
                    return {**(outcome.result or {}), "restarts": self._restarts}
                if (reason := self._pause(outcome)) is not None:
                    return self._ended(reason)
        finally:
            self._door.close()
            end_all()

    def _serve_once(self) -> Outcome:
        """Start the process and follow it to its end; nothing of it is left."""
        process = fork(self._ctx, self._place)
        self._door.open()
        asked = False
        try:
            while True:
                outcome = process.outcome()
                for frame in process.frames():
                    self._relay(frame)
                if outcome is not None:
                    return outcome
                if silent_s := self._too_long_silent():
                    message = f"the serving process has said nothing for {silent_s:.0f} s"
                    return Outcome(attempt=0, ok=False, fault=Fault.CRASH, message=message)
                if not asked and (request := self._ctx.cancelled) is not None:
                    process.send(request)
                    asked = True
                if process.wants_listener():
                    self._door.shut()
                    process.give_listener()
                self._wait(process)
        finally:
            self._heard = 0.0
            self._door.open()
            process.close()
            gone = end_all()
            self._not_ready()
            if not gone:
                raise RunnerError("processes of the served model are stuck in the kernel and could not be killed")

    def _too_long_silent(self) -> float:
        """For how long the process has been silent while it should serve, if that is too long; else 0."""
        silent_s = time.monotonic() - self._heard if self._heard else 0.0
        return silent_s if silent_s > max(LEAST_SILENCE_S, 3 * self._task.serve.health_interval_s) else 0.0

    def _pause(self, outcome: Outcome) -> str | None:
        """Wait before the next start; returns why there is none although nothing failed.

        Raises:
            ServeFailed, Cancelled: as for `run`.
        """
        since = self._place.since
        if (reason := self._reason(since)) is not None:
            return reason
        if since is None or outcome.fault in FINAL or self._restarts >= self._task.serve.restarts:
            raise ServeFailed(outcome, self._restarts) from None
        pause_s = min(FIRST_PAUSE_S * 2**self._restarts, LONGEST_PAUSE_S)
        self._restarts += 1
        self._ctx.log.error(
            "served model lost, restart %d of %d in %g s: %s",
            self._restarts, self._task.serve.restarts, pause_s, outcome.message,
        )  # fmt: skip
        self._ctx.phase("restart")
        end = time.monotonic() + pause_s
        while time.monotonic() < end:
            if (reason := self._reason(since)) is not None:
                return reason
            self._not_ready()
            self._wait(None)
        return None

    def _reason(self, since: float | None) -> str | None:
        """Why the task ends now, as a success; None: it does not.

        Raises:
            Cancelled: it ends otherwise.
        """
        request, ttl_s = self._ctx.cancelled, self._task.serve.ttl_s
        if request is not None:
            if since is not None and request.stop == "cancelled":
                return "cancelled"
            raise Cancelled(request.reason, checkpoint=request.checkpoint)
        return "ttl" if since is not None and ttl_s is not None and time.monotonic() - since >= ttl_s else None

    def _wait(self, process: Process | None) -> None:
        """Wait for news, and answer clients meanwhile."""
        poller = select.poll()
        fds = [] if process is None else process.waits_for()
        fds += [client.fileno() for client in self._door.waits_for()]
        fds += [] if self._ctx.pipe is None else [self._ctx.pipe.fileno()]
        for fd in fds:
            poller.register(fd, select.POLLIN)
        since = time.monotonic()
        poller.poll(POLL_S * 1000)
        if self._heard and (stood_s := time.monotonic() - since - POLL_S) > POLL_S:
            self._heard += stood_s  # this process was stopped, and so was perhaps the other one
        self._door.answer()
        if self._last is not None and not self._last.ready and time.monotonic() - self._said >= REPORT_S:
            self._send(self._last)

    def _relay(self, frame: Frame) -> None:
        if self._heard:
            self._heard = time.monotonic()
        match frame:
            case Phase(name=name):
                self._heard = 0.0  # it loads, or ends
                self._ctx.phase(name)
            case Progress() if self._restarts:
                self._send(msgspec.structs.replace(frame, metrics={**frame.metrics, "restarts": self._restarts}))
            case Progress():
                self._send(frame)
            case Serving():
                numbers = {**frame.numbers, "restarts": float(self._restarts)}
                since = self._place.since or time.monotonic()
                self._place = msgspec.structs.replace(
                    self._place, since=since, numbers=frame.numbers, times=frame.times
                )
                self._last = msgspec.structs.replace(frame, numbers=numbers)
                self._heard = time.monotonic()
                self._send(self._last)
            case _:
                pass

    def _not_ready(self) -> None:
        if self._last is not None and self._last.ready:
            self._last = msgspec.structs.replace(self._last, ready=False)
            self._send(self._last)

    def _send(self, frame: Progress | Serving) -> None:
        self._said = time.monotonic()
        if self._ctx.pipe is not None:
            self._ctx.pipe.send(frame, drop=True)

    def _ended(self, reason: str) -> dict[str, Any]:
        """The result of a task that ends while its model is not served."""
        assert self._last is not None, "it has been served"
        assert self._place.since is not None, "likewise"
        source = self._task.model.model.source.identifier or self._task.name
        seconds = time.monotonic() - self._place.since
        result = result_of(self._task, source, self._last.base_url, reason, self._place.numbers, seconds)
        return {**result, "restarts": self._restarts}
