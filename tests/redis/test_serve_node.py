"""A task of the type `serve` on a node, used by the openai client; and how it ends, whatever ends it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("fastapi", "transformers"):
    if importlib.util.find_spec(needed) is None:  # not imported: it would read HF_HUB_OFFLINE before it is set
        pytest.skip("needs the extra 'serve'", allow_module_level=True)
openai = pytest.importorskip("openai", reason="needs the extra 'api'")

from click.testing import CliRunner  # noqa: E402

from flowmesh.cli.control import Control  # noqa: E402
from flowmesh.cli.document_parser import parse  # noqa: E402
from flowmesh.cli.main import cli  # noqa: E402
from flowmesh.client import Client, Endpoint, NoEndpoint  # noqa: E402
from tests.kit.paths import ROOT  # noqa: E402
from tests.kit.support import Node, Orchestrator, RedisServer, alive, below, running, until  # noqa: E402

pytestmark = pytest.mark.redis

MODEL = {"source": {"identifier": "builtin:tiny-llama"}}
AGENT = {"base_url": "task:by-id", "max_turns": 1, "configName": "default"}
LOADED_S = 180.0
SLOTS = """
[[slots]]
name = "a"
[[slots]]
name = "b"
[tasks]
served_model_wait_s = 60.0
"""


class TwoSlots(Node):
    """A node whose workers are w1-a and w1-b."""

    def start(self, *, wait: bool = True) -> Node:
        super().start(wait=False)
        client = self.server.client()

        def there(worker: str) -> bool:
            pid, status = client.hmget(f"worker:{worker}", "pid", "status")
            return pid == str(self.pid).encode() and status in (b"IDLE", b"RUNNING")  # before, dispatches are lost

        until(lambda: there("w1-a") and there("w1-b"), "both workers are there")
        return self


class Place:
    """One node, its Redis, an orchestrator and a client."""

    def __init__(self, server: RedisServer, node: Node) -> None:
        self.redis = server.client()
        self.node = node
        self.peer = Orchestrator(server)
        self.client = Client(server.url)

    def serve(self, task_id: str, **fields: object) -> Endpoint:
        """Start a serving task; returns once it serves."""
        self.peer.dispatch(
            "w1-a", {"taskType": "serve", "model": MODEL, "engine": "transformers", "serve": fields}, task_id
        )
        return self.client.endpoint(task_id, wait_s=LOADED_S)

    def phase(self, task_id: str) -> str:
        """What a task does now."""
        tasks = {task["task_id"]: task["phase"] for task in self.node.ask(op="status")["tasks"]}
        return str(tasks.get(task_id, ""))

    def keyless(self, task_id: str, key: str) -> None:
        """The key is in nothing that the node keeps or tells, and its hash is gone."""
        until(lambda: not self.redis.exists(f"flowmesh:endpoint:{task_id}"), "the hash is gone")
        events = self.peer.of_task(task_id)
        assert events
        assert key not in repr(events)
        files = [path for path in self.node.home.rglob("*") if path.is_file()]
        assert any(path.name == "responses.json" for path in files)
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # of the spool, which is removed after the end is told
                assert key.encode() not in path.read_bytes(), path
        for name in self.redis.scan_iter("*"):
            assert key.encode() not in (self.redis.dump(name) or b""), name

    def close(self) -> None:
        self.client.close()
        self.peer.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with contextlib.closing(RedisServer()) as server:
        node = TwoSlots(server, "--set", "tasks.allow_serve=127.0.0.1", "--set", "tasks.local_hosts=", config=SLOTS)
        with running(node), contextlib.closing(Place(server, node)) as made:
            yield made


@contextlib.contextmanager
def user(endpoint: Endpoint, key: str | None = None) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.base_url, api_key=key or endpoint.api_key, max_retries=0, timeout=60) as made:
        yield made


def test_the_openai_client_uses_a_served_model_until_it_is_cancelled(place: Place) -> None:
    endpoint = place.serve("used", served_model_name="small")
    assert endpoint.model == "small"
    assert 0 < place.redis.ttl("flowmesh:endpoint:used") <= 30
    messages = [{"role": "user", "content": "hello"}]
    with user(endpoint) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        text = client.completions.create(model="small", prompt="hello", max_tokens=4, temperature=0)
        assert text.usage is not None
        assert 1 <= text.usage.completion_tokens <= 4
        asked = {"model": "small", "messages": messages, "max_tokens": 4, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        stream = client.chat.completions.create(**asked, stream=True)
        parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
        assert "".join(parts) == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="use 'small'"):
            client.completions.create(model="another", prompt="hello")
    with user(endpoint, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model="small", prompt="hello")
    shown = next(task for task in place.node.ask(op="status")["tasks"] if task["task_id"] == "used")
    assert shown["endpoint"] == {"base_url": endpoint.base_url, "model": "small"}
    with Control(place.node.state_dir) as control:
        assert control.endpoint("used").api_key == endpoint.api_key
    done = CliRunner().invoke(cli, ["show", "--endpoint", "used", "--state-dir", str(place.node.state_dir)])
    assert f"-H 'Authorization: Bearer {endpoint.api_key}'" in done.output
    argv = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below(place.node.pid)]
    assert not any(endpoint.api_key.encode() in each for each in argv)
    labels = '{task="used",model="small"}'
    until(lambda: place.node.metric(f"flowmesh_endpoint_requests_total{labels}") == 4, "the requests are counted")
    assert place.node.metric(f"flowmesh_endpoint_up{labels}") == 1
    assert place.node.metric(f"flowmesh_endpoint_first_token_seconds_count{labels}") == 1
    assert place.node.metric(f"flowmesh_endpoint_request_seconds_count{labels}") == 4
    assert place.node.metric(f"flowmesh_endpoint_completion_tokens_total{labels}") >= text.usage.completion_tokens
    place.client.cancel("used")
    end = place.peer.wait_end("used")
    assert end["type"] == "TASK_SUCCEEDED", end
    result = place.node.result("used")
    assert (result["reason"], result["requests"], result["failed"]) == ("cancelled", 4, 0)
    assert result["tokens"] == result["usage"]["completion_tokens"] >= text.usage.completion_tokens
    assert result["usage"]["prompt_tokens"] >= text.usage.prompt_tokens
    assert result["restarts"] == 0
    assert place.node.metric(f"flowmesh_endpoint_up{labels}") is None
    place.keyless("used", endpoint.api_key)
    with pytest.raises(NoEndpoint):
        place.client.endpoint("used")


def asking(task_id: str, *texts: str) -> dict[str, Any]:
    """A task that sends requests to the model that a task serves."""
    api = {"base_url": f"task:{task_id}", "body": {"max_tokens": 2}, "retries": 0}
    return {"taskType": "api", "data": {"type": "list", "items": list(texts or ("hello",))}, "api": api}


def test_tasks_use_a_served_model_by_the_id_of_its_task(place: Place) -> None:
    """One waits for it before it is there; the key is nowhere; another node is refused an address of its own."""
    waits = place.peer.dispatch("w1-b", asking("by-id"))
    until(lambda: place.phase(waits) == "wait for task:by-id", "the task waits for the model")
    agent = place.peer.dispatch("w1-b", {"taskType": "agent", "task": "Say hello.", "agent": AGENT})
    endpoint = place.serve("by-id", served_model_name="m")
    end = place.peer.wait_end(waits)
    assert "length: the answer is not whole" in end["error"], end  # a random model does not end by itself
    place.peer.wait_end(agent)
    log = (place.node.results_dir / agent / "execution_log.jsonl").read_text()
    assert "body.tools: it is not known how this model writes calls of tools" in log
    config = ["--set", "tasks.local_hosts=127.0.0.2", "--set", "tasks.served_model_wait_s=1"]
    with running(Node(place.node.server, *config, worker_id="w2")):
        end = place.peer.run("w2", asking("by-id"))
        assert "spec.api.base_url: the task by-id serves on another node at 127.0.0.1" in end["error"]
        end = place.peer.run("w2", asking("nobody"))
        assert end["payload"]["error_kind"] == "bad_request"
        assert "spec.api.base_url: no task 'nobody' has served a model within 1 s" in end["error"]
    place.client.cancel("by-id")
    assert place.peer.wait_end("by-id")["type"] == "TASK_SUCCEEDED"
    assert place.node.result("by-id")["requests"] >= 2
    place.keyless("by-id", endpoint.api_key)


def test_a_task_that_waits_for_a_model_can_be_cancelled(place: Place) -> None:
    task_id = place.peer.dispatch("w1-b", asking("never"))
    until(lambda: place.phase(task_id) == "wait for task:never", "the task waits for the model")
    place.client.cancel(task_id)
    assert place.peer.wait_end(task_id)["payload"]["error_kind"] == "cancelled"


def test_a_server_that_nobody_uses_ends_as_a_success(place: Place) -> None:
    spec = parse((ROOT / "conf/tasks/serve.yaml").read_text(), "serve.yaml", as_json=False)["spec"]
    place.peer.dispatch("w1-a", {**spec, "serve": {**spec["serve"], "idle_s": 0.5, "health_interval_s": 0.2}}, "idle")
    endpoint = place.client.endpoint("idle", wait_s=LOADED_S)
    end = place.peer.wait_end("idle")
    assert end["type"] == "TASK_SUCCEEDED", end
    result = place.node.result("idle")
    assert (result["reason"], result["requests"]) == ("idle", 0)
    assert result["model"]["name"] == endpoint.model == "tiny"
    place.keyless("idle", endpoint.api_key)


def test_a_time_limit_of_the_task_is_a_failure_and_its_own_is_not(place: Place) -> None:
    model = {**MODEL, "adapters": [{"path": "builtin:tiny-lora", "apply": "merge"}]}
    place.peer.dispatch("w1-a", {"taskType": "serve", "model": model, "serve": {"ttl_s": 0.5}}, "ttl")
    assert place.peer.wait_end("ttl")["type"] == "TASK_SUCCEEDED"
    assert place.node.result("ttl")["reason"] == "ttl"
    place.peer.dispatch("w1-a", {"taskType": "serve", "model": MODEL, "timeoutSec": 1.5}, "late")
    assert place.peer.wait_end("late")["payload"]["error_kind"] == "timeout"


def test_faults_of_the_document_are_named(place: Place) -> None:
    fields = {"host": "localhost", "port": 70000, "idle_s": 0, "ttl": 5}
    spec = {"taskType": "serve", "model": MODEL, "serve": fields}
    end = place.peer.run("w1-a", spec)
    assert end["payload"]["error_kind"] == "bad_request"
    for name in ("spec.serve.port", "spec.serve.idle_s", "spec.serve.ttl"):
        assert name in end["error"]
    for host, why in (("localhost", "expected an IP address"), ("0.0.0.0", "tasks.allow_serve")):
        end = place.peer.run("w1-a", {"taskType": "serve", "model": MODEL, "serve": {"host": host}})
        assert end["payload"]["error_kind"] == "bad_request"
        assert why in end["error"]


def serving(place: Place, *options: str) -> subprocess.Popen[str]:
    """`flowmesh serve` on the node."""
    config = place.node.home / "serve.toml"
    config.write_text(f'[node]\nstate_dir = "{place.node.state_dir}"\n')
    env = {name: value for name, value in os.environ.items() if name not in ("STATE_DIRECTORY", "REDIS_URL")}
    command = [sys.executable, "-m", "flowmesh.cli.main", "serve", "builtin:tiny-llama", *options]
    command += ["--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_ctrl_c_before_the_model_is_served_is_no_failure_of_the_task(place: Place) -> None:
    busy = [place.peer.dispatch(worker, {"taskType": "echo", "delaySec": 600}) for worker in ("w1-a", "w1-b")]
    for each in busy:
        until(lambda each=each: place.phase(each) == "wait", "the slot is busy")
    with serving(place) as process:
        until(lambda: len(place.node.ask(op="status")["tasks"]) == 3, "the model waits for a slot")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "flowmesh: interrupted before the model was served\n")
    for each in busy:
        place.client.cancel(each)
        place.peer.wait_end(each)


def test_flowmesh_serve_prints_address_and_key_and_ends_with_ctrl_c(place: Place) -> None:
    with serving(place, "--name", "it's") as process:
        assert process.stdout is not None
        told: list[str] = []
        while not (line := process.stdout.readline()).startswith("curl "):
            assert line, process.stderr.read() if process.stderr is not None else ""
            told.append(line)
        answer = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, timeout=60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [each.split()[:2] for each in told[-3:]] == [
        ["model", "it's"],
        ["base", "URL"],
        ["key", told[-1].split()[1]],
    ]
    assert "on the node that runs here" in told[0]
    assert json.loads(answer.stdout)["choices"]
    assert "served 1 request" in out


def test_a_served_model_outlives_its_supervisor_and_the_loss_of_redis_data(place: Place) -> None:
    endpoint = place.serve("adopted", served_model_name="m")
    place.redis.delete("flowmesh:endpoint:adopted")
    place.node.kill()
    with user(endpoint) as client:
        assert client.completions.create(model="m", prompt="hello", max_tokens=2).choices
    place.node.start()
    assert place.client.endpoint("adopted", wait_s=LOADED_S) == endpoint
    place.client.cancel("adopted")
    assert place.peer.wait_end("adopted")["type"] == "TASK_SUCCEEDED"
    assert place.node.result("adopted")["requests"] == 1
    place.keyless("adopted", endpoint.api_key)


def test_a_lost_server_comes_back_with_its_address_and_key_and_not_for_ever(place: Place) -> None:
    endpoint = place.serve("again", served_model_name="m", restarts=1)
    labels = '{task="again",model="m"}'
    with user(endpoint) as client:
        assert client.completions.create(model="m", prompt="hello", max_tokens=2).choices
    until(lambda: place.node.metric(f"flowmesh_endpoint_requests_total{labels}") == 1, "the request is counted")
    task = place.node.task_pid("again")
    (serving,) = below(task)
    os.kill(serving, signal.SIGKILL)
    until(lambda: not place.redis.exists("flowmesh:endpoint:again"), "the hash is gone")
    with user(endpoint) as client, pytest.raises(openai.APIStatusError) as refused:
        client.models.list()
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "5"
    assert place.node.metric(f"flowmesh_endpoint_up{labels}") == 0
    assert place.client.endpoint("again", wait_s=LOADED_S) == endpoint
    with user(endpoint) as client:
        assert client.completions.create(model="m", prompt="hello", max_tokens=2).choices
    until(lambda: place.node.metric(f"flowmesh_endpoint_requests_total{labels}") == 2, "the counts go on")
    assert place.node.metric(f"flowmesh_endpoint_restarts_total{labels}") == 1
    assert place.node.task_pid("again") == task
    (serving,) = below(task)
    os.kill(serving, signal.SIGKILL)
    end = place.peer.wait_end("again")
    assert end["payload"]["error_kind"] == "crash"
    assert end["error"] == "the serving process was killed by SIGKILL (restarts: 1)"
    assert place.node.metric(f"flowmesh_endpoint_up{labels}") is None
    place.keyless("again", endpoint.api_key)


@pytest.mark.parametrize("whom", ["child", "fork server"])
def test_a_kill_in_mid_generation_leaves_nothing(place: Place, whom: str) -> None:
    name = f"killed-{whom.replace(' ', '-')}"
    endpoint = place.serve(name)
    child = place.node.task_pid(name)
    server = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
    first = threading.Event()

    def ask() -> None:
        with user(endpoint) as client, contextlib.suppress(Exception):
            asked = {"model": endpoint.model, "prompt": "hello", "max_tokens": 1500, "stream": True}
            for _ in client.completions.create(**asked):
                first.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert first.wait(60)
    os.kill(child if whom == "child" else server, signal.SIGKILL)
    end = place.peer.wait_end(name)
    thread.join(60)
    assert end["type"] == "TASK_FAILED"
    until(lambda: not alive(child), "the serving process is gone")
    with user(endpoint) as client, pytest.raises(openai.APIConnectionError):
        client.models.list()
    place.keyless(name, endpoint.api_key)
    assert place.peer.run("w1-a", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_the_type_is_off_by_default(orchestrator: Orchestrator, node: Node) -> None:
    end = orchestrator.run("w1", {"taskType": "serve", "model": MODEL})
    assert "tasks.allow_serve" in end["error"]
