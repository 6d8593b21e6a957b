"""The client of a node's control socket, `<state_dir>/run/control.sock`: one JSON object a line, both ways."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from flowmesh.errors import FlowMeshError, ProtocolError, UnavailableError

TIMEOUT_S = 10.0
_CHUNK = 64 * 1024

T = TypeVar("T")


class Refused(FlowMeshError):
    """The node understood and said no."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    slot: str | int | None = None
    status: str = ""
    task_id: str | None = None
    gpus: tuple[Any, ...] = ()


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How far a task is. `total` is None where nobody knows."""

    done: float = 0.0
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] | None = None


class TaskStatus(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    task_type: str | None = None
    state: str = ""
    phase: str | None = None
    progress: Done | None = None
    pid: int | None = None
    started_at: str | None = None
    out_dir: str | None = None


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    version: str = ""
    uptime_s: float = 0.0
    redis_up: bool = False
    redis_troubles: tuple[str, ...] = ()
    draining: str | None = None
    isolation: str = ""
    workers: tuple[WorkerStatus, ...] = ()
    tasks: tuple[TaskStatus, ...] = ()
    queued: int = 0
    outbox: int = 0
    warnings: dict[str, str] = {}
    """By environment: why its tasks fail, or are slow to start."""


class LogsPlace(msgspec.Struct, frozen=True, kw_only=True):
    out_dir: str
    logs_dir: str
    running: bool = False


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    out_dir: str = ""
    sent_bytes: int = 0
    seconds: float = 0.0
    urls: tuple[str, ...] = ()


class StateSeen(msgspec.Struct, frozen=True, tag_field="event", tag="state"):
    state: str


class PhaseSeen(msgspec.Struct, frozen=True, tag_field="event", tag="phase"):
    phase: str


class ProgressSeen(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="progress"):
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="end"):
    ok: bool
    verdict: str | None = None
    error: str | None = None
    out_dir: str | None = None


Seen = StateSeen | PhaseSeen | ProgressSeen | Ended


class Control:
    """One connection to a node. A `watch` takes it for itself."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "run" / "control.sock"
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(TIMEOUT_S)
        self._buffer = b""
        try:
            self._sock.connect(str(self.path))
        except PermissionError:
            self._sock.close()
            raise UnavailableError(f"{self.path} is another user's: ask as the user that the node runs as") from None
        except OSError as error:
            self._sock.close()
            raise UnavailableError(
                f"no node answers at {self.path} ({error.strerror or error}): "
                "is it running, and is this its --state-dir or --config?"
            ) from None

    def __enter__(self) -> Control:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def interrupt(self) -> None:
        """Make a `watch` in another thread end now."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def status(self) -> NodeStatus:
        return self._ask({"op": "status"}, NodeStatus)

    def status_json(self) -> dict[str, Any]:
        """The status as the node said it, with what this client has no name for."""
        return self._ask({"op": "status"}, dict[str, Any])

    def logs(self, task_id: str) -> LogsPlace:
        return self._ask({"op": "logs", "task_id": task_id}, LogsPlace)

    def cancel(self, task_id: str, *, force: bool = False) -> dict[str, Any]:
        return self._ask({"op": "cancel", "task_id": task_id, "force": force}, dict[str, Any])

    def drain(self, mode: str) -> dict[str, Any]:
        return self._ask({"op": "drain", "mode": mode}, dict[str, Any])

    def deliver(self, task_id: str) -> Delivered:
        return self._ask({"op": "deliver", "task_id": task_id}, Delivered, timeout_s=None)

    def recycle(self, environment: str | None) -> dict[str, Any]:
        return self._ask({"op": "recycle", "environment": environment}, dict[str, Any])

    def upgrade(self) -> dict[str, Any]:
        return self._ask({"op": "upgrade"}, dict[str, Any])

    def watch(self, task_id: str) -> Iterator[Seen]:
        """What becomes of a task, until its `Ended`. The task may be unknown yet. Events of a newer node are skipped.

        Raises:
            UnavailableError: the node went away first.
        """
        self._send({"op": "watch", "task_id": task_id})
        self._sock.settimeout(None)  # a task may say nothing for hours
        return self._watched()

    def _watched(self) -> Iterator[Seen]:
        while True:
            line = self._line()
            said = _decode(line, dict[str, Any])
            if said.get("ok") is False and "event" not in said:
                raise Refused(str(said.get("error") or "the node refused"))
            if said.get("event") not in ("state", "phase", "progress", "end"):
                continue
            seen: Seen = _decode(line, Seen)  # type: ignore[arg-type]
            yield seen
            if isinstance(seen, Ended):
                return

    def _ask(self, request: dict[str, Any], answer: type[T], timeout_s: float | None = TIMEOUT_S) -> T:
        self._send(request)
        if timeout_s is None:
            self._sock.settimeout(None)
        line = self._line(None if timeout_s is None else time.monotonic() + timeout_s)
        said = _decode(line, dict[str, Any])
        if said.get("ok") is not True:
            raise Refused(str(said.get("error") or f"the node refused the operation {request['op']!r}"))
        return _decode(line, answer)

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._sock.sendall(msgspec.json.encode(request) + b"\n")
        except OSError as error:
            raise UnavailableError(f"the node at {self.path} went away: {error.strerror or error}") from None

    def _line(self, deadline: float | None = None) -> bytes:
        while b"\n" not in self._buffer:
            if deadline is not None:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._sock.recv(_CHUNK)
            except TimeoutError:
                raise UnavailableError(f"the node at {self.path} did not answer within {TIMEOUT_S:g} s") from None
            except OSError as error:
                raise UnavailableError(f"the node at {self.path} went away: {error.strerror or error}") from None
            if not chunk:
                raise UnavailableError(f"the node at {self.path} closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _decode(line: bytes, into: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=into)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the node said something that the control protocol does not have: {error}") from None
