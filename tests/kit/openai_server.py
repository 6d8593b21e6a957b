"""An OpenAI-compatible server whose every answer a test decides: text, tool calls, streams, errors, slowness.

Real HTTP on 127.0.0.1; `requests` has what came in, as it came in.
"""

from __future__ import annotations

import dataclasses
import json
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

from tests.kit.fake_http import FakeHandler, FakeServer


@dataclasses.dataclass
class Say:
    """A message of the model: text, and calls as (name, arguments)."""

    text: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    usage: tuple[int, int] = (10, 5)
    ids: tuple[str, ...] = ()
    """Of the calls; default: call_0, call_1, …"""
    finish: str | None = None
    """The finish reason; default: as the API has it."""
    refusal: str | None = None


def call(tool: str, /, **arguments: Any) -> Say:
    return Say(calls=((tool, arguments),))


def answer(text: str) -> Say:
    return call("final_answer", answer=text)


@dataclasses.dataclass
class Fail:
    """An HTTP status in place of an answer."""

    status: int
    body: str = ""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Hang:
    """No answer until the server ends."""


@dataclasses.dataclass
class Break:
    """The connection ends in the middle of the answer."""


@dataclasses.dataclass
class Raw:
    """A body of one's own, with status 200."""

    body: bytes
    content_type: str = "application/json"


@dataclasses.dataclass
class Events:
    """A stream of the test's own: JSON bodies, or lines as they are."""

    events: tuple[dict[str, Any] | str, ...]
    done: bool = True
    """Whether [DONE] follows."""
    hang: bool = False
    """Whether the connection then stays open until the server ends."""


def delta(finish: str | None = None, **part: Any) -> dict[str, Any]:
    """One event of a stream."""
    return {"choices": [{"index": 0, "delta": part, "finish_reason": finish}]}


Step = Say | Fail | Hang | Break | Raw | Events
Decide = Callable[[dict[str, Any]], Step]


@dataclasses.dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def results(self) -> list[str]:
        """What the tools gave, of a request in the endpoint's own messages."""
        return [each["content"] for each in self.body.get("messages", ()) if each["role"] == "tool"]


class Server(FakeServer):
    def __init__(self, *steps: Step, decide: Decide | None = None, key: str | None = None) -> None:
        """
        Args:
            steps: one after the other, where `decide` does not make them from the request.
            key: the bearer token that it wants.
        """
        super().__init__(_Handler)
        self.steps = list(steps)
        self.decide = decide
        self.key = key
        self.models = ["test-model"]
        self.requests: list[Request] = []
        self.asked = threading.Event()
        self.left = threading.Event()
        """A client closed its connection while it had no answer yet."""

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    def next_step(self, request: Request) -> Step:
        with self.lock:
            self.requests.append(request)
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                said = request.headers.get("authorization", "nothing")
                return Fail(401, json.dumps({"error": {"message": f"Incorrect API key provided: {said}"}}))
            if self.decide is not None:
                return self.decide(request.body)
            return self.steps.pop(0) if self.steps else Fail(400, '{"error": "the test has no more answers"}')


class _Handler(FakeHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer_json(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.body())
        step = self.server.next_step(Request(self.path, self.lower_headers(), body))
        self.server.asked.set()
        match step:
            case Fail():
                self.answer(step.status, step.body.encode(), {"Content-Type": "application/json", **step.headers})
            case Hang():
                self._hang()
                self.close_connection = True
            case Break():
                kind, half = ("application/json", b'{"ch')
                if body.get("stream"):
                    kind, half = ("text/event-stream", b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n')
                self.answer(200, half, {"Content-Type": kind, "Content-Length": "10000"})
                self.close_connection = True
            case Raw():
                self.answer(200, step.body, {"Content-Type": step.content_type})
            case Events():
                self._send_events(step)
            case Say() if body.get("stream"):
                self._stream(step)
            case Say():
                self.answer_json(200, _completion(step))

    def _stream(self, step: Say) -> None:
        """The answer in small pieces, arguments cut wherever it falls."""
        events: list[dict[str, Any]] = [{"content": step.text[i : i + 3]} for i in range(0, len(step.text), 3)]
        for index, each in enumerate(_calls(step)):
            function = each["function"]
            first = {"index": index, "id": each["id"], "type": "function"}
            events.append({"tool_calls": [{**first, "function": {"name": function["name"], "arguments": ""}}]})
            text = function["arguments"]
            for i in range(0, len(text), 5):
                events.append({"tool_calls": [{"index": index, "function": {"arguments": text[i : i + 5]}}]})
        lines = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in events]
        if step.refusal is not None:
            lines.append(delta(refusal=step.refusal))
        lines.append(delta(step.finish or "stop"))
        lines.append({"choices": [], "usage": _usage(step)})
        self._send_events(Events(tuple(lines)))

    def _send_events(self, step: Events) -> None:
        self.begin(200, {"Content-Type": "text/event-stream", "Connection": "close"})
        for event in step.events:
            line = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            self.wfile.write(line.encode())
            self.wfile.flush()
        if step.done:
            self.wfile.write(b"data: [DONE]\n\n")
            self.wfile.flush()
        if step.hang:
            self._hang()

    def _hang(self) -> None:
        """Stay silent until the server ends or the client has closed the connection."""
        while not self.server.over.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.05)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.server.left.set()
                return


def _calls(step: Say) -> list[dict[str, Any]]:
    return [
        {
            "id": step.ids[index] if step.ids else f"call_{index}",
            "type": "function",
            "function": {"name": name, "arguments": a if isinstance(a, str) else json.dumps(a)},
        }
        for index, (name, a) in enumerate(step.calls)
    ]


def _usage(step: Say) -> dict[str, int]:
    prompt, completion = step.usage
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(step: Say) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": step.text or None}
    if step.calls:
        message["tool_calls"] = _calls(step)
    if step.refusal is not None:
        message["refusal"] = step.refusal
    finish = step.finish or ("tool_calls" if step.calls else "stop")
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": _usage(step),
    }
