"""A task's process that cannot be set up is the node's fault: the task goes back, and runs when that is over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.support import Node, Orchestrator, RedisServer, running, until

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Orchestrator, Node]]:
    redis_server = RedisServer()
    orchestrator = Orchestrator(redis_server)
    with running(Node(redis_server)) as node:
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
        yield orchestrator, node
    orchestrator.close()
    redis_server.close()


@contextlib.contextmanager
def stopped_server(node: Node) -> Iterator[None]:
    """What is dispatched meanwhile is prepared, and not forked before the block ends."""
    (server,) = node.servers()
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


def prepared(node: Node, task: str) -> Path:
    """The spool folder of a task that was prepared; its fork was asked for."""

    def found() -> Path | None:
        jobs = (node.state_dir / "spool").glob("*/job.json")
        texts = ((path.parent, path.read_text()) for path in jobs)
        return next((spool for spool, text in texts if text and json.loads(text)["task_id"] == task), None)

    return until(found, "the task is prepared")


def test_its_spool_folder_is_gone(both: tuple[Orchestrator, Node]) -> None:
    orchestrator, node = both
    with stopped_server(node):
        task = orchestrator.dispatch("w1", {"taskType": "echo"})
        shutil.rmtree(prepared(node, task))
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert "environment light: its process could not be set up: [Errno 2]" in node.text()
    assert len([each for each in orchestrator.of_task(task) if each["type"] == "TASK_STARTED"]) == 1


def test_its_own_folder_is_gone(both: tuple[Orchestrator, Node]) -> None:
    orchestrator, node = both
    before = node.text().count("degraded")
    with stopped_server(node):
        task = orchestrator.dispatch("w1", {"taskType": "echo"})
        prepared(node, task)
        shutil.rmtree(node.results_dir / task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.text().count("degraded") == before, "no other task is concerned"


def test_the_results_folder_is_a_file(both: tuple[Orchestrator, Node]) -> None:
    orchestrator, node = both
    aside = node.home / "aside"
    with stopped_server(node):
        task = orchestrator.dispatch("w1", {"taskType": "echo"})
        prepared(node, task)
        node.results_dir.rename(aside)
        node.results_dir.touch()
    node.wait_status("DEGRADED")
    until(lambda: node.ask(op="status")["queued"] == 1, "the task is in the queue")
    assert orchestrator.of_task(task) == []
    node.results_dir.unlink()
    aside.rename(node.results_dir)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    node.wait_status("IDLE")


def test_the_spool_folder_is_deleted_while_it_runs(both: tuple[Orchestrator, Node]) -> None:
    orchestrator, node = both
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.5})
    orchestrator.wait_started(task)
    shutil.rmtree(node.state_dir / "spool")
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.result(task)["ok"], "what was computed is not lost"


@pytest.mark.parametrize(
    ("levels", "kind"), [(490, None), (520, "bad_request"), (900, "bad_request"), (940, "bad_request")]
)
def test_a_deep_document_runs_or_is_refused(both: tuple[Orchestrator, Node], levels: int, kind: str | None) -> None:
    orchestrator, _ = both
    deep: list[object] = ["https://user:secret-secret@host/"]
    for _ in range(levels - 4):
        deep = [deep]
    end = orchestrator.run("w1", {"taskType": "echo", "message": "x", "payload": deep})
    assert end.get("payload", {}).get("error_kind") == kind, end
