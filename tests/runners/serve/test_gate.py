"""The gate before a served model, through a real HTTP server on loopback and the openai client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from runners.serve.gate import Gate, ServedModel  # noqa: E402

KEY = "a-key-of-this-test"
MODEL = ServedModel(name="m", pinned="pinned")
ANSWER = b'{"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": []}'


class Server:
    """An application behind a gate; `/v1/responses` waits for `release`, `/v1/chat/completions` answers with 500."""

    def __init__(self, models: Sequence[ServedModel] = (), events: Sequence[bytes] = (), **options: Any) -> None:
        self.events = events
        self.now = 100.0
        self.gate = Gate(self.app, KEY, models or [MODEL], **options, own_key="own", clock=lambda: self.now)
        self.reached: list[str] = []
        self.bodies: list[dict[str, object]] = []
        self.started = threading.Event()
        self.release = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.clients: list[openai.OpenAI] = []
        self.server = uvicorn.Server(uvicorn.Config(self.gate, lifespan="off", log_level="error", ws="none"))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()

    async def app(self, scope, receive, send) -> None:
        self.reached.append(scope["path"])
        if scope["method"] == "POST":
            self.bodies.append(json.loads((await receive())["body"]))
        if scope["path"] == "/v1/responses":
            self.started.set()
            await asyncio.to_thread(self.release.wait, 30)
        status = 500 if scope["path"] == "/v1/chat/completions" else 200
        kind = b"text/event-stream" if self.events else b"application/json"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if self.events else ANSWER})

    def client(self, key: str = KEY):
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30))
        return self.clients[-1]

    def close(self) -> None:
        """End the server. A client has its answer a moment before the gate has counted it; after this it has."""
        self.release.set()
        self.server.should_exit = True
        self.thread.join(30)
        for client in self.clients:
            client.close()
        self.listener.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_only_the_key_of_the_task_reaches_the_model(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        server.client("another").completions.create(model="m", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        server.client("another").models.list()
    assert server.reached == []
    assert server.gate.requests == 0
    assert server.client().completions.create(model="m", prompt="x").id == "1"
    server.close()
    assert (server.gate.requests, server.gate.failed) == (1, 0)


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/../reset", "//reset", "/v1/load_lora_adapter", "/docs"])
def test_paths_that_change_the_server_do_not_reach_it(server: Server, path: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        server.client().with_options(base_url=server.url).post(path, cast_to=object, body={})
    assert server.reached == []


def test_health_checks_do_not_keep_a_server_alive(server: Server) -> None:
    server.now += 7
    server.client().with_options(base_url=server.url).get("/health", cast_to=object)
    assert server.gate.idle_s() == 7
    server.client().completions.create(model="m", prompt="x")
    server.close()
    assert server.gate.idle_s() == 0
    server.now += 3
    assert server.gate.idle_s() == 3


def test_a_request_that_runs_is_not_idle_however_long_it_takes(server: Server) -> None:
    asked = threading.Thread(target=lambda: server.client().post("/responses", cast_to=object, body={}))
    asked.start()
    assert server.started.wait(30)
    server.now += 1000
    assert (server.gate.running, server.gate.idle_s()) == (1, 0)
    server.release.set()
    asked.join(30)
    server.close()
    assert (server.gate.running, server.gate.requests) == (0, 1)


def test_failed_requests_are_counted_as_such(server: Server) -> None:
    with pytest.raises(openai.InternalServerError):
        server.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    server.close()
    assert (server.gate.requests, server.gate.failed, server.gate.running) == (1, 1, 0)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="key: is empty"):
        Gate(lambda *_: None, "", [MODEL])


def test_clients_use_the_name_of_the_model_and_never_the_library_s(server: Server) -> None:
    client = server.client()
    client.completions.create(model="m", prompt="x")
    client.post("/completions", cast_to=object, body={"prompt": "y"})
    assert server.bodies == [{"model": "pinned", "prompt": "x"}, {"model": "pinned", "prompt": "y"}]
    assert [model.id for model in client.models.list()] == ["m"]
    for name in ("pinned", "/models/other"):
        with pytest.raises(openai.NotFoundError, match="use 'm'") as refused:
            client.completions.create(model=name, prompt="x")
        assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="not a JSON object"):
        client.post("/completions", cast_to=object, content=b"[1]")
    assert len(server.bodies) == 2


def test_checks_of_the_task_itself_are_not_counted(server: Server) -> None:
    server.now += 5
    assert server.client("own").completions.create(model="m", prompt="x").id == "1"
    server.close()
    assert (server.gate.requests, server.gate.idle_s()) == (0, 5)


def test_each_model_gets_its_own_name_and_end_tokens() -> None:
    tuned = ServedModel(name="tuned", pinned="lora", ends=(7,))
    with contextlib.closing(Server([MODEL, tuned])) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["m", "tuned"]
        client.post("/completions", cast_to=object, body={"stop_token_ids": [3], "model": "tuned"})
        client.post("/completions", cast_to=object, body={"ignore_eos": True, "model": "tuned"})
        client.post("/completions", cast_to=object, body={"prompt": "x"})
        with pytest.raises(openai.NotFoundError, match="use 'm' or 'tuned'"):
            client.post("/completions", cast_to=object, body={"model": ["m"]})
    assert server.bodies == [
        {"model": "lora", "stop_token_ids": [3, 7]},
        {"model": "lora", "ignore_eos": True},
        {"model": "pinned", "prompt": "x"},
    ]


def test_fields_that_the_library_would_ignore_are_refused_by_name() -> None:
    fields = {"/v1/completions": ["model", "prompt"]}
    with contextlib.closing(Server(fields=fields)) as server:
        client = server.client()
        for name, value in (("foo", 1), ("functions", [{"name": "f"}]), ("modalities", ["audio"])):
            with pytest.raises(openai.BadRequestError, match=f"{name}: not a field of /v1/completions here") as refused:
                client.post("/completions", cast_to=object, body={"prompt": "x", name: value})
            assert refused.value.param == name
        with pytest.raises(openai.BadRequestError, match="stream: expected true or false"):
            client.post("/completions", cast_to=object, body={"prompt": "x", "stream": "yes"})
        nothing = {"foo": None, "user": "me", "functions": [], "modalities": ["text"], "function_call": "none"}
        client.post("/completions", cast_to=object, body={"prompt": "x", **nothing})
        with pytest.raises(openai.InternalServerError):
            client.post("/chat/completions", cast_to=object, body={"foo": 1})
    assert len(server.bodies) == 2


EVENTS = (
    b'data: {"choices":[{"index":0,"text":"a"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":5,"total_tokens":6}}\n\n',
    b"data: [DONE]\n\n",
)


def test_a_stream_that_ends_in_an_error_has_failed() -> None:
    with (
        contextlib.closing(
            Server(events=[EVENTS[0], b'data: {"error": {"message": "it died", "code": 500}}\n\n'])
        ) as server,
        pytest.raises(openai.APIError, match="it died"),
    ):
        list(server.client().completions.create(model="m", prompt="x", stream=True))
    assert (server.gate.requests, server.gate.failed) == (1, 1)


@pytest.mark.parametrize("wanted", [False, True])
def test_tokens_of_streams_are_counted_and_shown_to_those_who_ask(wanted: bool) -> None:
    """As vLLM's server has it: it reports usage to those who ask for it."""
    with contextlib.closing(Server([MODEL], EVENTS, asks_usage=True)) as server:
        options = {"stream_options": {"include_usage": True}} if wanted else {}
        parts = list(server.client().completions.create(model="m", prompt="x", stream=True, **options))
        assert [bool(part.choices) for part in parts] == ([True, False] if wanted else [True])
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    assert server.gate.tokens == 5
