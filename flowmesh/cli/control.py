"""The client of a node's control socket, `<state_dir>/run/control.sock`: one JSON object per line, both ways."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from flowmesh.cli.control_types import Delivered, Ended, Endpoint, LogsPlace, NodeStatus, Seen, Taken
from flowmesh.errors import FlowMeshError, ProtocolError, UnavailableError

TIMEOUT_S = 10.0
_CHUNK = 64 * 1024
_PEER = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

T = TypeVar("T")


class Refused(FlowMeshError):
    """The node answered that it cannot fulfil the request."""


class NotPermitted(UnavailableError):
    """The control socket belongs to another user."""


class NodeProcess:
    """The process that answers on a control socket, also after its program was replaced."""

    def __init__(self, pid: int) -> None:
        """
        Args:
            pid: 0: it is not visible from here, as in another container.
        """
        self._fd: int | None = None
        with contextlib.suppress(OSError):  # EINVAL: pid 0; ESRCH: it has just ended; ENOSYS: an old kernel
            self._fd = os.pidfd_open(pid)

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def ended(self) -> bool:
        """Whether it has ended; False where that is unknown."""
        return self._fd is not None and bool(select.select([self._fd], [], [], 0)[0])


class Control:
    """One connection to a node. Once `watch` is called, it serves nothing else.

    Raises:
        NotPermitted: the node runs as another user.
        UnavailableError: no node answers there.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "run" / "control.sock"
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(TIMEOUT_S)
        self._buffer = b""
        try:
            self._sock.connect(str(self.path))
        except PermissionError:
            self._sock.close()
            raise NotPermitted(f"no permission for {self.path}: run this as the user that the node runs as") from None
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
        """End a `watch` that runs in another thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has already ended

    def process(self) -> NodeProcess:
        """The node's process; to be closed."""
        return NodeProcess(_PEER.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0])

    def status(self) -> NodeStatus:
        return self._ask({"op": "status"}, NodeStatus)

    def status_json(self, limit: int | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """The status as the node sent it, with fields that this client does not know.

        Args:
            limit: list at most so many waiting tasks and deliveries; a node of an older version lists all.
        """
        request = {"op": "status"} | ({} if limit is None else {"limit": limit})
        return self._ask(request, dict[str, Any], timeout_s)

    def metrics(self) -> str:
        """The node's metrics, in Prometheus' text format."""
        return str(self._ask({"op": "metrics"}, dict[str, Any]).get("text", ""))

    def logs(self, task_id: str) -> LogsPlace:
        return self._ask({"op": "logs", "task_id": task_id}, LogsPlace)

    def endpoint(self, task_id: str) -> Endpoint:
        """Where a running task serves a model.

        Raises:
            Refused: it serves none now.
        """
        return self._ask({"op": "endpoint", "task_id": task_id}, Endpoint)

    def cancel(self, task_id: str, *, force: bool = False) -> dict[str, Any]:
        return self._ask({"op": "cancel", "task_id": task_id, "force": force}, dict[str, Any])

    def submit(self, task_id: str, document: dict[str, Any], *, watch: bool = False) -> Taken:
        """Hand a task to the node.

        Args:
            watch: `watched` has its events next, unless it was refused.

        Raises:
            Refused: it fits none of its workers, or the node takes no task now.
        """
        body = msgspec.json.encode(document)
        self._send({"op": "submit", "task_id": task_id, "bytes": len(body), "watch": watch}, body)
        return self._answer("submit", Taken)

    def drain(self, mode: str) -> dict[str, Any]:
        return self._ask({"op": "drain", "mode": mode}, dict[str, Any])

    def undrain(self) -> dict[str, Any]:
        return self._ask({"op": "undrain"}, dict[str, Any])

    def deliver(self, task_id: str) -> Delivered:
        return self._ask({"op": "deliver", "task_id": task_id}, Delivered, timeout_s=None)

    def recycle(self, environment: str | None) -> dict[str, Any]:
        return self._ask({"op": "recycle", "environment": environment}, dict[str, Any])

    def upgrade(self) -> dict[str, Any]:
        # The node first starts the new program to check it, and bounds that itself.
        return self._ask({"op": "upgrade"}, dict[str, Any], timeout_s=None)

    def watch(self, task_id: str) -> Iterator[Seen]:
        """A task's events up to its `Ended`. The task need not be known yet. Unknown kinds of event are skipped.

        Raises:
            UnavailableError: the node closed the connection before.
        """
        self._send({"op": "watch", "task_id": task_id})
        return self.watched()

    def watched(self) -> Iterator[Seen]:
        """See `watch` and `submit`."""
        self._sock.settimeout(None)  # a task may report nothing for hours
        while True:
            line = self._line()
            message = _decode(line, dict[str, Any])
            if message.get("ok") is False and "event" not in message:
                raise Refused(str(message.get("error") or "the node refused to watch, without a reason"))
            if message.get("event") not in ("state", "phase", "progress", "end"):
                continue
            seen: Seen = _decode(line, Seen)  # type: ignore[arg-type]
            yield seen
            if isinstance(seen, Ended):
                return

    def _ask(self, request: dict[str, Any], answer: type[T], timeout_s: float | None = TIMEOUT_S) -> T:
        self._send(request)
        return self._answer(request["op"], answer, timeout_s)

    def _answer(self, op: str, answer: type[T], timeout_s: float | None = TIMEOUT_S) -> T:
        if timeout_s is None:
            self._sock.settimeout(None)
        line = self._line(None if timeout_s is None else time.monotonic() + timeout_s)
        message = _decode(line, dict[str, Any])
        if message.get("ok") is not True:
            raise Refused(str(message.get("error") or f"the node refused {op!r}, without a reason"))
        return _decode(line, answer)

    def _send(self, request: dict[str, Any], body: bytes = b"") -> None:
        try:
            self._sock.sendall(msgspec.json.encode(request) + b"\n" + body)
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, error: OSError) -> UnavailableError:
        return UnavailableError(f"lost the connection to the node at {self.path}: {error.strerror or error}")

    def _line(self, deadline: float | None = None) -> bytes:
        while b"\n" not in self._buffer:
            if deadline is not None:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._sock.recv(_CHUNK)
            except TimeoutError:
                raise UnavailableError(f"the node at {self.path} did not answer within {TIMEOUT_S:g} s") from None
            except OSError as error:
                raise self._lost(error) from None
            if not chunk:
                raise UnavailableError(f"the node at {self.path} closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _decode(line: bytes, into: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=into)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the node's answer does not fit the control protocol: {error}; is its version the same as this command's?"
        ) from None
