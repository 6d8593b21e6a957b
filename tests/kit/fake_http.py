"""The base of the HTTP servers that tests start on 127.0.0.1: a server in threads, and a handler with short answers."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any, Self


class FakeServer(http.server.ThreadingHTTPServer):
    """`with FakeServer(Handler) as server`: listens on a free port of 127.0.0.1 until the block ends.

    Each connection has a thread. A thread that answers nothing waits for `over`, so that the server can end.
    """

    daemon_threads = True

    def __init__(self, handler: type[FakeHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.lock = threading.Lock()
        """Guards what handlers in several threads change."""
        self.over = threading.Event()
        """Set when the server ends."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def running(self) -> Self:
        """The server itself: `with Server().running() as server`."""
        return self

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class FakeHandler(http.server.BaseHTTPRequestHandler):
    """Requests over kept connections. A client that goes away is no error."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: Any

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def lower_headers(self) -> dict[str, str]:
        """The request's headers, with names in lower case."""
        return {name.lower(): value for name, value in self.headers.items()}

    def body(self) -> bytes:
        """The request's body; it has a Content-Length."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def begin(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Send the status line and the headers."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole answer. `headers` may claim another Content-Length than the body's."""
        self.begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def answer_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})
