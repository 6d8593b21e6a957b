"""A real HTTP server on loopback that receives results as docs/contract.md says, and misbehaves on request.

Each request takes the next step of `plan`; where there is none left it is accepted. What arrived whole is in
`received`, with a file's checksum taken while it was read.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

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
    """Nothing is read or answered any more when so much of the body was read."""

    after_bytes: int = 0


Step = Answer | Reset | Stall


class Server:
    """`with Server() as server`: listens on a free port of 127.0.0.1 until the block ends.

    Args:
        unsized: whether it takes bodies without a length; otherwise it answers 411 to them, whatever the plan says.
    """

    def __init__(self, *plan: Step, unsized: bool = False) -> None:
        self.plan = list(plan)
        self.unsized = unsized
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request, also of those that went wrong."""
        self.received: list[Received] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._httpd.daemon_threads = True
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._httpd.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def files(self) -> dict[str, Received]:
        return {r.file_name: r for r in self.received if r.file_name is not None}

    def results(self) -> list[Any]:
        return [r.json["result"] for r in self.received if r.file_name is None]

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def _step(self) -> Step:
        with self._lock:
            return self.plan.pop(0) if self.plan else Answer()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    super().handle_one_request()

            def do_POST(self) -> None:
                server._serve(self)

            do_PUT = do_PATCH = do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        started = time.monotonic()
        in_chunks = handler.headers.get("Transfer-Encoding") == "chunked"
        step = self._step() if self.unsized or not in_chunks else Answer(411, early=True)
        with self._lock:
            self.requests.append((handler.command, handler.path))
        match step:
            case Reset(after):
                handler.rfile.read(after)
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                handler.close_connection = True
                handler.connection.close()
                return
            case Stall(after):
                handler.rfile.read(after)
                self._over.wait()
                handler.close_connection = True
                return
            case Answer():
                if not step.early:
                    received = self._read(handler)
                    received.seconds = time.monotonic() - started
                    if 200 <= step.status < 300:
                        with self._lock:
                            self.received.append(received)
        handler.send_response(step.status)
        for name, value in step.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(step.body)))
        if step.early:
            handler.send_header("Connection", "close")
            handler.close_connection = True
        handler.end_headers()
        if not step.trickle_s:
            handler.wfile.write(step.body)
            return
        for byte in step.body:
            handler.wfile.write(bytes((byte,)))
            if self._over.wait(step.trickle_s):
                break

    @staticmethod
    def _read(handler: http.server.BaseHTTPRequestHandler) -> Received:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        received = Received(handler.command, handler.path, headers)
        received.unsized = "transfer-encoding" in headers
        if not received.unsized:
            return Server._parse(received, handler.rfile, int(headers.get("content-length", 0)))
        assert "content-length" not in headers
        with tempfile.TemporaryFile() as body:
            return Server._parse(received, body, _unchunk(handler.rfile, body))

    @staticmethod
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
