"""A real HTTP server on loopback that receives results as docs/contract.md says, and misbehaves on request.

Each request takes the next step of `plan`; where there is none left it is accepted. What arrived whole is in
`received`, with a file's checksum taken while it was read.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.kit.fake_http import FakeHandler, FakeServer

BLOCK = 64 * 1024


@dataclass
class Received:
    """One request whose body arrived whole."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes = b""
    """Empty for a file's."""
    file_name: str | None = None
    file_size: int = 0
    file_sha256: str = ""
    seconds: float = 0.0
    unsized: bool = False
    """Whether it came without a length, in chunks."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What a request gets. With `early`, before its body was read, and the connection is closed."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    early: bool = False
    trickle_s: float = 0.0
    """Between two bytes of the body."""


@dataclass
class Reset:
    """The connection is reset when so much of the body was read."""

    after_bytes: int = 0


@dataclass
class Stall:
    """Nothing is read or answered any more when so much of the body was read, until the server's `release()`."""

    after_bytes: int = 0


Step = Answer | Reset | Stall


class Server(FakeServer):
    """
    Args:
        unsized: whether it takes bodies without a length; otherwise it answers 411 to them, whatever the plan says.
    """

    def __init__(self, *plan: Step, unsized: bool = False) -> None:
        super().__init__(_Handler)
        self.plan = list(plan)
        self.unsized = unsized
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request, also of those that went wrong."""
        self.received: list[Received] = []
        self._released = threading.Event()

    @property
    def url(self) -> str:
        return self.origin

    def files(self) -> dict[str, Received]:
        return {r.file_name: r for r in self.received if r.file_name is not None}

    def results(self) -> list[Any]:
        return [r.json["result"] for r in self.received if r.file_name is None]

    def stall(self) -> None:
        """Wait for the next `release()`."""
        with self.lock:
            released = self._released
        released.wait()

    def release(self) -> None:
        """Close the connections that stall now."""
        with self.lock:
            released, self._released = self._released, threading.Event()
        released.set()

    def __exit__(self, *_: object) -> None:
        self.release()
        super().__exit__()

    def next_step(self, method: str, path: str, *, unsized: bool) -> Step:
        with self.lock:
            self.requests.append((method, path))
            if unsized and not self.unsized:
                return Answer(411, early=True)
            return self.plan.pop(0) if self.plan else Answer()


class _Handler(FakeHandler):
    server: Server

    def do_POST(self) -> None:
        started = time.monotonic()
        unsized = self.headers.get("Transfer-Encoding") == "chunked"
        match self.server.next_step(self.command, self.path, unsized=unsized):
            case Reset(after):
                self.rfile.read(after)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            case Stall(after):
                self.rfile.read(after)
                self.server.stall()
                self.close_connection = True
            case Answer() as step:
                if not step.early:
                    received = self._read()
                    received.seconds = time.monotonic() - started
                    if 200 <= step.status < 300:
                        with self.server.lock:
                            self.server.received.append(received)
                self._reply(step)

    do_PUT = do_PATCH = do_GET = do_POST

    def _reply(self, step: Answer) -> None:
        headers = {**step.headers, **({"Connection": "close"} if step.early else {})}
        if not step.trickle_s:
            self.answer(step.status, step.body, headers)
            return
        self.begin(step.status, {**headers, "Content-Length": str(len(step.body))})
        for byte in step.body:
            self.wfile.write(bytes((byte,)))
            if self.server.over.wait(step.trickle_s):
                break

    def _read(self) -> Received:
        headers = self.lower_headers()
        received = Received(self.command, self.path, headers)
        received.unsized = "transfer-encoding" in headers
        if not received.unsized:
            return _parse(received, self.rfile, int(headers.get("content-length", 0)))
        assert "content-length" not in headers
        with tempfile.TemporaryFile() as body:
            return _parse(received, body, _unchunk(self.rfile, body))


def _parse(received: Received, body: Any, left: int) -> Received:
    kind, _, rest = received.headers.get("content-type", "").partition(";")
    if kind != "multipart/form-data":
        received.body = body.read(left)
        assert len(received.body) == left
        return received
    boundary = rest.strip().removeprefix("boundary=").encode()
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = body.readline()
        assert line
        head += line
    assert head.startswith(b"--" + boundary + b"\r\n")
    disposition = head.split(b"\r\n")[1].decode()
    assert disposition.startswith('Content-Disposition: form-data; name="file"; filename="')
    received.file_name = disposition.split('filename="')[1].removesuffix('"').replace("%22", '"')
    tail = b"\r\n--" + boundary + b"--\r\n"
    left -= len(head) + len(tail)
    digest = hashlib.sha256()
    while left:
        data = body.read(min(BLOCK, left))
        assert data, "the body ended early"
        digest.update(data)
        received.file_size += len(data)
        left -= len(data)
    assert body.read(len(tail)) == tail
    received.file_sha256 = digest.hexdigest()
    return received


def _unchunk(source: Any, target: Any) -> int:
    """Write a chunked body's content to `target`, and go back to its beginning; returns its length."""
    while size := int(source.readline(), 16):
        data = source.read(size)
        assert len(data) == size, "the body ended early"
        target.write(data)
        assert source.readline() == b"\r\n"
    assert source.readline() == b"\r\n"
    length = int(target.tell())
    target.seek(0)
    return length
