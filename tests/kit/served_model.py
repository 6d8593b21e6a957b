"""A served model behind its gate on loopback, in the test's own process, and a client that sends what it is told to."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from flowmesh.messages.job import Job
from runners.api import Context
from runners.serve.gate import Gate
from runners.serve.served import Served, load
from runners.serve.task import read_serve
from tests.kit.paths import PERMITS

KEY = "a-key-of-this-test"


class Reply(msgspec.Struct, frozen=True):
    """What a client got."""

    status: int
    body: Any
    """Of a stream: its events."""
    text: str

    @property
    def error(self) -> str:
        return str(self.body["error"]["message"])

    def joined(self, index: int = 0, field: str = "content") -> str:
        """The text of one of a stream's choices."""
        choices = [each for event in self.body for each in event["choices"] if each["index"] == index]
        return "".join(each["text"] if "text" in each else each["delta"].get(field) or "" for each in choices)


class Endpoint:
    """A served model's address."""

    def __init__(self, served: Served, gate: Gate, port: int) -> None:
        self.served = served
        self.gate = gate
        self.port = port

    def connection(self, path: str, body: Any) -> http.client.HTTPConnection:
        """One that has sent a request."""
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        made.request("POST", f"/v1/{path}", data, {"Authorization": f"Bearer {KEY}"})
        return made

    def ask(self, path: str, body: Any = None, **fields: Any) -> Reply:
        with contextlib.closing(self.connection(path, fields if body is None else body)) as connection:
            answer = connection.getresponse()
            text = answer.read().decode()
        if answer.getheader("content-type", "").startswith("text/event-stream"):
            lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
            assert lines[-1] == "[DONE]"
            return Reply(answer.status, [json.loads(line) for line in lines[:-1]], text)
        return Reply(answer.status, json.loads(text), text)

    def chat(self, *content: Any, **fields: Any) -> Reply:
        """Ask with one message of the user."""
        told: Any = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
        return self.ask("chat/completions", messages=[{"role": "user", "content": told}], **fields)


@contextlib.contextmanager
def serving(folder: Path, cache: Path, model: dict[str, Any], **serve: Any) -> Iterator[Endpoint]:
    """A model of Transformers, served until the end."""
    spec = {"model": model, "engine": "transformers", "serve": serve}
    out_dir, tmp_dir = folder / "out", folder / "tmp"
    out_dir.mkdir(parents=True)
    tmp_dir.mkdir()
    job = Job(
        task_id="served", task_type="serve", task={"spec": spec}, attempt=1, runner="tests:none",
        out_dir=str(out_dir), results_dir=str(folder), cache_dir=str(cache), tmp_dir=str(tmp_dir), threads=1,
        permits=PERMITS,
    )  # fmt: skip
    ctx = Context(job, None)
    served = load(ctx, read_serve(ctx, spec))
    gate = Gate(served.app, KEY, served.models, asks_usage=served.asks_usage)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(gate, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Endpoint(served, gate, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
            served.close()
