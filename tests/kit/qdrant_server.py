"""Qdrant's REST interface, as far as the runner uses it, over qdrant-client's local engine: real HTTP, real search."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

from qdrant_client import QdrantClient, models

from tests.kit.fake_http import FakeHandler, FakeServer

_COLLECTION = re.compile(r"/collections/(?P<name>[^/]+)(?P<rest>/points/query/batch|/points|/exists)?")


class Server(FakeServer):
    def __init__(self, engine: QdrantClient, *, key: str | None = None) -> None:
        super().__init__(_Handler)
        self.engine = engine
        self.key = key
        self.requests: list[str] = []
        self.failing: list[int] = []
        """Statuses of the next answers, in place of the real ones."""
        self.silent = threading.Event()
        """Set: requests get no answer until the server ends."""
        self.asked = threading.Event()

    @property
    def url(self) -> str:
        return self.origin

    def answer(self, path: str, body: bytes, key: str | None, method: str = "GET") -> tuple[int, Any]:
        with self.lock:
            self.requests.append(path)
            self.asked.set()
            if self.silent.is_set():
                self.over.wait(60)
            if self.failing:
                return self.failing.pop(0), {"status": {"error": "as the test wants it"}}
            if self.key is not None and key != self.key:
                return 401, {"status": {"error": f"wrong key {key}"}}
            match = _COLLECTION.fullmatch(path.split("?", maxsplit=1)[0])
            if match is not None and (made := self._written(method, match["name"], match["rest"], body)) is not None:
                return 200, {"result": made, "status": "ok", "time": 0}
            if match is None or not self.engine.collection_exists(match["name"]):
                return 404, {"status": {"error": "Not found"}}
            if match["rest"] is None:
                return 200, {"result": _plain(self.engine.get_collection(match["name"])), "status": "ok", "time": 0}
            wanted = [models.QueryRequest(**each) for each in json.loads(body)["searches"]]
            found = self.engine.query_batch_points(match["name"], wanted)
            return 200, {"result": [_plain(each) for each in found], "status": "ok", "time": 0}

    def _written(self, method: str, name: str, rest: str | None, body: bytes) -> Any:
        """The answer to a request that asks whether a collection is there, or changes one; None: it is another one."""
        if rest == "/exists":
            return {"exists": self.engine.collection_exists(name)}
        if method == "PUT" and rest is None:
            wanted = json.loads(body)["vectors"]
            return self.engine.create_collection(name, vectors_config=models.VectorParams(**wanted))
        if method == "PUT":
            points = [models.PointStruct(**each) for each in json.loads(body)["points"]]
            return _plain(self.engine.upsert(name, points))
        return None


class _Handler(FakeHandler):
    server: Server

    def do_GET(self) -> None:
        status, answer = self.server.answer(self.path, self.body(), self.headers.get("api-key"), self.command)
        self.answer_json(status, answer, {"Retry-After": "1"} if status == 429 else None)

    do_POST = do_PUT = do_GET


def _plain(value: Any) -> Any:
    return json.loads(value.model_dump_json())
