"""Qdrant's REST interface, as far as the runner uses it, over qdrant-client's local engine: real HTTP, real search."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qdrant_client import QdrantClient, models

_COLLECTION = re.compile(r"/collections/(?P<name>[^/]+)(?P<rest>/points/query/batch)?")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, engine: QdrantClient, *, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.engine = engine
        self.key = key
        self.requests: list[str] = []
        self.failing: list[int] = []
        """Statuses of the next answers, in place of the real ones."""
        self.silent = threading.Event()
        """Set: requests get no answer until the server ends."""
        self.asked = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self.shutdown()
            thread.join()
            self.server_close()

    def answer(self, path: str, body: bytes, key: str | None) -> tuple[int, Any]:
        with self._lock:
            self.requests.append(path)
            self.asked.set()
            if self.silent.is_set():
                self._over.wait(60)
            if self.failing:
                return self.failing.pop(0), {"status": {"error": "as the test wants it"}}
            if self.key is not None and key != self.key:
                return 401, {"status": {"error": f"wrong key {key}"}}
            match = _COLLECTION.fullmatch(path.split("?", maxsplit=1)[0])
            if match is None or not self.engine.collection_exists(match["name"]):
                return 404, {"status": {"error": "Not found"}}
            if match["rest"] is None:
                return 200, {"result": _plain(self.engine.get_collection(match["name"])), "status": "ok", "time": 0}
            wanted = [models.QueryRequest(**each) for each in json.loads(body)["searches"]]
            found = self.engine.query_batch_points(match["name"], wanted)
            return 200, {"result": [_plain(each) for each in found], "status": "ok", "time": 0}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.server.answer(self.path, body, self.headers.get("api-key"))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def _plain(value: Any) -> Any:
    return json.loads(value.model_dump_json())
