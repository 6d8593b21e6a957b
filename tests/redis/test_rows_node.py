"""Rows through a whole node: whatever ends an inference task, its retry computes only what is missing."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.rows import Kept, read
from tests.kit.inference_specs import mixed_prompts, spec_of
from tests.kit.promises import wait_state
from tests.kit.results_server import ResultsServer
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the inference extra"),
]
PROMPTS = 96
SPEC: dict[str, Any] = {
    "taskType": "inference",
    "enforce_cpu": True,
    **spec_of("builtin:tiny-llama", mixed_prompts(PROMPTS, 8), max_tokens=24, ignore_eos=True),
}
"""Three batches on the CPU: rows come in three bursts."""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    redis_server = RedisServer()
    yield redis_server
    redis_server.close()


@pytest.fixture(scope="module")
def peer(server: RedisServer) -> Iterator[Orchestrator]:
    orchestrator = Orchestrator(server)
    yield orchestrator
    orchestrator.close()


@pytest.fixture(scope="module")
def one_node(server: RedisServer) -> Iterator[Node]:
    node = Node(server)
    try:
        yield node.start()
    finally:
        node.close()


@pytest.fixture
def node(one_node: Node, request: pytest.FixtureRequest) -> Iterator[Node]:
    yield one_node
    if getattr(request.node, "failed", False):
        print(one_node.text()[-6000:])


@pytest.fixture(scope="module")
def whole(one_node: Node, peer: Orchestrator) -> dict[str, Any]:
    """The result of an undisturbed run."""
    end = peer.run("w1", SPEC, task_id="undisturbed")
    assert end["type"] == "TASK_SUCCEEDED", end
    assert end["payload"]["resources"]["rows"] == {
        "done": PROMPTS, "total": PROMPTS, "reused": 0, "reused_tokens": 0,
    }  # fmt: skip
    return dict(one_node.result("undisturbed"))


@pytest.fixture
def results(tmp_path: Path) -> Iterator[ResultsServer]:
    with ResultsServer(tmp_path) as server:
        yield server


def to(results: ResultsServer) -> dict[str, Any]:
    """The task's `output`: results and files go to this server."""
    return {"destination": {"type": "http", "url": f"{results.origin}/api/v1/results"}}


def kept(node: Node, task_id: str) -> Kept:
    try:
        with open(node.results_dir / task_id / "rows.jsonl", "rb") as file:
            return read(file)
    except FileNotFoundError:
        return Kept()


def begin(node: Node, peer: Orchestrator, task_id: str, **fields: Any) -> int:
    """Dispatch the task, and wait until some rows stand and others are being computed; returns its pid."""
    peer.dispatch("w1", SPEC | fields, task_id)
    pid = node.task_pid(task_id)
    until(lambda: kept(node, task_id).rows, f"{task_id} has rows")
    return pid


def check_interrupted(node: Node, end: dict[str, Any], kind: str, whole: dict[str, Any]) -> int:
    """What the event and the result of the interrupted attempt say; returns how many tokens its rows hold."""
    assert end["type"] == "TASK_FAILED", end
    payload, task_id = end["payload"], end["task_id"]
    assert payload["error_kind"] == kind
    rows = kept(node, task_id)
    done = len(rows.current)
    assert 0 < done < PROMPTS
    assert len(rows.rows) == done, "no row twice"
    assert payload["rows"] == {"done": done, "total": PROMPTS}
    assert payload["resources"]["rows"]["done"] == done
    result = node.result(task_id)
    assert (result["ok"], result["partial"], result["rows"]) == (False, True, payload["rows"])
    answers = {item["index"]: item for item in whole["items"]}
    assert result["items"] == [answers[index] for index in sorted(rows.current)]
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in rows.current.values())
    assert result["usage"]["total_tokens"] == tokens
    return tokens


def check_retry(result: dict[str, Any], end: dict[str, Any], done: int, tokens: int, whole: dict[str, Any]) -> None:
    """The attempt that goes on took over all that stood, and ends with what an undisturbed one has."""
    assert end["type"] == "TASK_SUCCEEDED", end
    assert result["items"] == whole["items"]
    assert result["rows"] == {"done": PROMPTS, "total": PROMPTS, "reused": done, "reused_tokens": tokens}
    assert end["payload"]["resources"]["rows"] == result["rows"]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert result["usage"][count] == whole["usage"][count]


def retry(  # noqa: PLR0917
    node: Node, peer: Orchestrator, task_id: str, kind: str, whole: dict[str, Any], resume: dict[str, str] | None = None
) -> None:
    """Check the interrupted attempt that has ended, and its retry with the same id on the same node."""
    first = peer.wait_end(task_id)
    tokens = check_interrupted(node, first, kind, whole)
    assert first["payload"]["resume"] == (resume or {"path": str(node.results_dir / task_id)})
    before = kept(node, task_id).rows
    peer.task_events.clear()
    check_retry(
        end=peer.run("w1", SPEC, task_id=task_id),
        result=node.result(task_id),
        done=len(before),
        tokens=tokens,
        whole=whole,
    )
    after = kept(node, task_id).rows
    assert len(after) == PROMPTS
    assert after[: len(before)] == before, "what stood is not written again"


def test_the_child_is_killed_again_and_again(node: Node, peer: Orchestrator, whole: dict[str, Any]) -> None:
    os.kill(begin(node, peer, "child"), signal.SIGKILL)
    draw = random.Random(7)
    for _ in range(4):
        first = peer.wait_end("child")
        tokens = check_interrupted(node, first, "crash", whole)
        peer.task_events.clear()
        peer.dispatch("w1", SPEC, "child")
        pid = node.task_pid("child")
        time.sleep(draw.uniform(0, 0.2))  # while it reads, loads, or computes the next batch
        os.kill(pid, signal.SIGKILL)
        again = check_interrupted(node, peer.wait_end("child"), "crash", whole)
        assert again >= tokens, "rows of earlier attempts are lost"
    retry(node, peer, "child", "crash", whole)


def test_it_is_cancelled(node: Node, peer: Orchestrator, whole: dict[str, Any]) -> None:
    begin(node, peer, "cancel")
    node.ask(op="cancel", task_id="cancel")
    retry(node, peer, "cancel", "cancelled", whole)


def test_it_runs_into_its_time_limit(node: Node, peer: Orchestrator, whole: dict[str, Any]) -> None:
    pid = begin(node, peer, "timeout", timeoutSec=10)
    os.kill(pid, signal.SIGSTOP)  # else a fast machine is done in time
    wait_state(node, "timeout", "stopping")
    os.kill(pid, signal.SIGCONT)
    retry(node, peer, "timeout", "timeout", whole)


def test_the_supervisor_is_killed_and_the_next_one_adopts(
    node: Node, peer: Orchestrator, whole: dict[str, Any]
) -> None:
    begin(node, peer, "adopted")
    node.kill()
    node.start()
    end = peer.wait_end("adopted")
    assert end["type"] == "TASK_SUCCEEDED", end
    assert end["payload"]["resources"]["rows"] == {
        "done": PROMPTS, "total": PROMPTS, "reused": 0, "reused_tokens": 0,
    }  # fmt: skip
    assert node.result("adopted")["items"] == whole["items"]
    assert len(kept(node, "adopted").rows) == PROMPTS


def test_both_are_killed(node: Node, peer: Orchestrator, whole: dict[str, Any], results: ResultsServer) -> None:
    pid = begin(node, peer, "both", output=to(results))
    node.kill()
    os.kill(pid, signal.SIGKILL)
    node.start()
    resume = {"url": f"{results.origin}/api/v1/results/both/files/rows.jsonl.gz"}
    retry(node, peer, "both", "crash", whole, resume)


def test_a_drained_task_goes_on_on_another_node(
    server: RedisServer, node: Node, peer: Orchestrator, whole: dict[str, Any], results: ResultsServer
) -> None:
    begin(node, peer, "drained", output=to(results))
    node.ask(op="drain", mode="checkpoint")
    end = peer.wait_end("drained")
    tokens = check_interrupted(node, end, "drained", whole)
    assert end["payload"]["retryable"] is True
    other = Node(server, worker_id="w2")
    try:
        other.start()
        again = peer.run("w2", SPEC | {"resume": end["payload"]["resume"]}, task_id="goes-on")
        check_retry(other.result("goes-on"), again, end["payload"]["rows"]["done"], tokens, whole)
    except BaseException:
        print(other.text()[-6000:])
        raise
    finally:
        other.close()
