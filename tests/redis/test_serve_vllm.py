"""Tasks of the type `serve` on vLLM, on a node: used by the openai client, and whole in their end."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai", reason="needs the extra 'api'")

from flowmesh.cli.document_parser import parse  # noqa: E402
from flowmesh.client import Client, Endpoint  # noqa: E402
from tests.kit.paths import ROOT  # noqa: E402
from tests.kit.support import Node, Orchestrator, RedisServer, alive, below, running, until, with_mark  # noqa: E402

pytestmark = [
    pytest.mark.redis,
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: scripts/test runs this"
    ),
    pytest.mark.timeout(600),
]
LOADED_S = 400.0
CACHE = {"VLLM_CACHE_ROOT": str(Path("~/.cache/vllm").expanduser())}
"""vLLM's own default: what it finds out about a model's class, in ten seconds of CPU time, is kept there."""
MESSAGES = [{"role": "user", "content": "hello"}]


class Place:
    """One node, an orchestrator and a client; the model lies on disk, so that no task computes before it forks."""

    def __init__(self, server: RedisServer, node: Node, folder: Path) -> None:
        from tests.kit.tiny_models import write_tiny_llama, write_tiny_lora

        self.node = node
        self.peer = Orchestrator(server)
        self.client = Client(server.url)
        self.model, self.adapter = str(folder / "small"), str(folder / "lora")
        for each in (self.model, self.adapter):
            Path(each).mkdir()
        write_tiny_llama(Path(self.model))
        write_tiny_lora(Path(self.model), Path(self.adapter))

    def serve(self, task_id: str, model: dict[str, Any] | None = None, **fields: Any) -> tuple[Endpoint, list[int]]:
        """Start the example of conf/tasks with this model; returns once it serves, with the pids of its processes."""
        spec = parse((ROOT / "conf/tasks/serve-vllm.yaml").read_text(), "serve-vllm.yaml", as_json=False)["spec"]
        spec["model"] |= {"source": {"identifier": self.model}, **(model or {})}
        spec["env"] = CACHE
        spec["serve"] = spec["serve"] | {"idle_s": None, "ttl_s": None} | fields
        self.peer.dispatch("w1", spec, task_id)
        endpoint = self.client.endpoint(task_id, wait_s=LOADED_S)
        first = self.node.task_pid(task_id)
        return endpoint, [first, *below(first)]

    def left(self, tree: list[int]) -> list[int]:
        mark = f"FLOWMESH_ATTEMPT={self.node.ask(op='status')['node_id']}:"
        return [each for each in tree if alive(each)] + with_mark(mark)

    def close(self) -> None:
        self.client.close()
        self.peer.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.closing(RedisServer()) as server:
        node = Node(server, "--set", "tasks.allow_serve=127.0.0.1", "--set", "tasks.allow_env=VLLM_CACHE_ROOT")
        with running(node), contextlib.closing(Place(server, node, tmp_path_factory.mktemp("served"))) as made:
            yield made


@contextlib.contextmanager
def user(endpoint: Endpoint, key: str | None = None) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.base_url, api_key=key or endpoint.api_key, max_retries=0, timeout=60) as made:
        yield made


def in_mid_generation(endpoint: Endpoint, act: Callable[[], None]) -> None:
    """Act once the first part of a long answer is there; returns when the client's stream has ended."""
    first = threading.Event()

    def ask() -> None:
        asked = {"model": endpoint.model, "prompt": "hello", "max_tokens": 500, "extra_body": {"ignore_eos": True}}
        with user(endpoint) as client, contextlib.suppress(Exception):
            for _ in client.completions.create(**asked, stream=True):
                first.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert first.wait(60)
        act()
    finally:
        thread.join(60)


def test_the_openai_client_uses_a_model_and_nothing_outlives_a_sigkill(place: Place) -> None:
    endpoint, tree = place.serve("used", tool_call_parser="hermes")
    assert endpoint.model == "tiny"
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    with user(endpoint) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        text = client.completions.create(model="tiny", prompt="hello", max_tokens=4, temperature=0)
        assert text.usage is not None
        assert text.model == "tiny"
        whole = client.chat.completions.create(**asked)
        parts = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
        told = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert whole.usage is not None
        assert told[-1].usage == whole.usage
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        assert client.chat.completions.create(**asked, tools=[tool]).choices
        for name, value in (("foo", 1), ("functions", [tool["function"]]), ("generation_config", "{}")):
            with pytest.raises(openai.BadRequestError, match=f"{name}: not a field of /v1/chat/completions here"):
                client.chat.completions.create(**asked, extra_body={name: value})
        seeded = [client.chat.completions.create(**asked | {"temperature": 1}, seed=7, user="me") for _ in range(2)]
        assert seeded[0].choices[0].message.content == seeded[1].choices[0].message.content
        picture = {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": [picture]}]})
        with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
            client.completions.create(model=place.model, prompt="hello")
        for path in ("/metrics", "/load", "/v1/load_lora_adapter", "/tokenize"):
            with pytest.raises(openai.NotFoundError, match="not served"):
                client.with_options(base_url=endpoint.base_url.removesuffix("/v1")).post(path, cast_to=object)
    with user(endpoint, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model="tiny", prompt="hello")
    for pid in tree:
        assert endpoint.api_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert endpoint.api_key.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert len(tree) >= 2, "the engine has a process of its own"
    used = 'flowmesh_endpoint_kv_cache_usage{task="used",model="tiny"}'

    def kill() -> None:
        until(lambda: place.node.metric(used), "the node's metrics have what the engine says of its cache")
        os.kill(tree[0], signal.SIGKILL)

    in_mid_generation(endpoint, kill)
    until(lambda: not place.left(tree), "all its processes are gone", 5)
    end = place.peer.wait_end("used")
    assert end["payload"]["error_kind"] == "crash"
    assert end["payload"]["exit"]["signal"] == "SIGKILL"
    assert place.peer.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_adapters_are_models_and_the_death_of_the_engine_ends_the_task(place: Place) -> None:
    adapters = [{"name": "tuned", "path": place.adapter}, {"name": "weak", "path": place.adapter, "scale": 0.01}]
    endpoint, tree = place.serve("adapted", {"adapters": adapters}, restarts=0)
    with user(endpoint) as client:
        assert [model.id for model in client.models.list()] == ["tuned", "weak"], "on the CPU not the base model"
        texts = [
            client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0).choices[0].text
            for name in ("tuned", "weak", "tuned")
        ]
        assert texts[0] == texts[2] != texts[1]
        with ThreadPoolExecutor(8) as pool:
            names = ("tuned", "weak") * 4
            asked = [
                pool.submit(client.completions.create, model=name, prompt="hello", max_tokens=8, temperature=0)
                for name in names
            ]
            assert [each.result().choices[0].text for each in asked] == texts[:2] * 4, "in one batch, too"
        with pytest.raises(openai.NotFoundError, match="use 'tuned' or 'weak'"):
            client.completions.create(model="tiny", prompt="hello")
    engine = engine_of(tree[0])
    in_mid_generation(endpoint, lambda: os.kill(engine, signal.SIGKILL))
    end = place.peer.wait_end("adapted")
    assert end["payload"]["error_kind"] == "crash"
    assert f"a process of vLLM's engine (pid {engine}) died" in end["error"]
    until(lambda: not place.left(tree), "all its processes are gone", 5)


def engine_of(task: int) -> int:
    """The process of a task's engine: below its serving process, where Python may track shared memory in another."""
    _, *under = below(task)
    (found,) = [pid for pid in under if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


class Asking(threading.Thread):
    """A long request, and what came of it: status, answer, or the error of the connection."""

    def __init__(self, endpoint: Endpoint, *, stream: bool) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._stream = stream
        self.begun = threading.Event()
        self.status = 0
        self.answer = b""
        self.broke: Exception | None = None

    def run(self) -> None:
        parts = urlsplit(self._endpoint.base_url)
        with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)) as client:
            body = {"prompt": "hello", "max_tokens": 500, "n": 4, "ignore_eos": True, "stream": self._stream}
            headers = {"Authorization": f"Bearer {self._endpoint.api_key}"}
            client.request("POST", "/v1/completions", json.dumps(body), headers)
            try:
                answer = client.getresponse()
                self.status = answer.status
                while part := answer.read1(65536):
                    self.answer += part
                    self.begun.set()
            except (OSError, http.client.HTTPException) as error:
                self.broke = error


def test_an_engine_that_dies_is_started_again_and_requests_under_way_get_an_error(place: Place) -> None:
    endpoint, tree = place.serve("again", restarts=1)
    labels = '{task="again",model="tiny"}'
    task, serving, engine = tree[0], tree[1], engine_of(tree[0])
    streamed, whole = Asking(endpoint, stream=True), Asking(endpoint, stream=False)
    streamed.start()
    assert streamed.begun.wait(60)
    assert streamed.status == 200, streamed.answer
    os.kill(engine, signal.SIGSTOP)  # so that both are under way when it dies
    whole.start()
    until(lambda: place.node.metric(f"flowmesh_endpoint_running{labels}") == 2, "both are being answered")
    os.kill(engine, signal.SIGKILL)
    for each in (streamed, whole):
        each.join(60)
        assert not each.is_alive()
    assert streamed.broke is whole.broke is None
    assert b'"error"' in streamed.answer
    assert whole.status == 500
    assert b"EngineCore encountered an issue" in whole.answer
    until(lambda: place.node.metric(f"flowmesh_endpoint_restarts_total{labels}") == 1, "it is started again", LOADED_S)
    until(lambda: place.node.metric(f"flowmesh_endpoint_up{labels}") == 1, "it serves again", LOADED_S)
    assert place.client.endpoint("again", wait_s=LOADED_S) == endpoint
    assert not [pid for pid in tree[1:] if alive(pid)]
    assert place.node.task_pid("again") == task
    tree += below(task)
    assert engine_of(task) not in (engine, serving), "there is one, a new one"
    with user(endpoint) as client:
        answer = client.completions.create(model="tiny", prompt="hello", max_tokens=4, temperature=0)
    assert answer.usage is not None
    place.client.cancel("again")
    assert place.peer.wait_end("again")["type"] == "TASK_SUCCEEDED"
    result = place.node.result("again")
    assert (result["restarts"], result["requests"]) == (1, 3)
    assert not place.left(tree)


def test_an_idle_server_ends_as_a_success_with_its_counts(place: Place) -> None:
    endpoint, tree = place.serve("idle", idle_s=1.5)
    with user(endpoint) as client:
        answer = client.completions.create(model="tiny", prompt="hello", max_tokens=4, temperature=0)
        for _ in client.completions.create(model="tiny", prompt="hello", max_tokens=4, temperature=0, stream=True):
            pass
    end = place.peer.wait_end("idle")
    assert end["type"] == "TASK_SUCCEEDED", end
    result = place.node.result("idle")
    assert (result["reason"], result["requests"], result["failed"]) == ("idle", 2, 0)
    assert answer.usage is not None
    assert result["tokens"] == 2 * answer.usage.completion_tokens, (
        "that of the stream, too, which did not ask for usage"
    )
    assert not place.left(tree)


def test_what_vllm_does_not_have_is_refused_by_name(place: Place) -> None:
    spec = {
        "taskType": "serve",
        "engine": "vllm",
        "model": {"source": {"identifier": place.model}, "vllm": {"allowed_local_media_path": "/"}},
    }
    for change, message in (
        ({}, "spec.model.vllm.allowed_local_media_path: may load code, open files"),
        (
            {"serve": {"tool_call_parser": "herme"}},
            "spec.serve.tool_call_parser: vLLM has no parser 'herme'; did you mean",
        ),
    ):
        end = place.peer.run("w1", spec | change)
        assert end["payload"]["error_kind"] == "bad_request"
        assert message in end["error"]
