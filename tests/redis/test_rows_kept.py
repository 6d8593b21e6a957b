"""Rows of a task that ends early: an artifact for another node whatever ended it, and those of merged children."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.rows import Kept, read
from runners.training.step_notes import StepNotes
from tests.kit.results_server import ResultsServer
from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis
TOKEN = "n0de-t0ken-for-rows"
CONFIG = """
[tasks]
cancel_grace_s = 0.5
term_grace_s = 0.5
local_hosts = ["*"]

[task_types.rows]
runner = "tests.kit.row_runners:RowsRunner"
environment = "light"
"""
COUNT, QUICK = 12, 5
SPEC: dict[str, Any] = {"taskType": "rows", "count": COUNT, "quick": QUICK, "row_s": 300}
"""Has its first rows at once, and no other before the test ends it."""
FAST = SPEC | {"row_s": 0}


@pytest.fixture
def results(tmp_path: Path) -> Iterator[ResultsServer]:
    """The orchestrator's HTTP side, which knows the node's token only."""
    with ResultsServer(tmp_path) as server:
        server.token = f"Bearer {TOKEN}"
        yield server


@pytest.fixture
def node(make_node, results: ResultsServer) -> Node:
    made: Node = make_node(config=CONFIG, env={"ORCHESTRATOR_TOKEN": TOKEN, "ORCHESTRATOR_BASE_URL": results.origin})
    return made


def kept(folder: Path) -> Kept:
    try:
        with (folder / "rows.jsonl").open("rb") as file:
            return read(file)
    except FileNotFoundError:
        return Kept()


def end_early(node: Node, orchestrator: Orchestrator, how: str, task_id: str, pid: int) -> None:
    match how:
        case "crash":
            os.kill(pid, signal.SIGKILL)
        case "cancelled":
            node.ask(op="cancel", task_id=task_id)
        case "both":
            node.kill()
            os.kill(pid, signal.SIGKILL)
            node.start()
        case "drained":
            node.ask(op="drain", mode="checkpoint")


def test_rows_are_an_artifact_whatever_ended_the_task(
    node: Node, orchestrator: Orchestrator, results: ResultsServer
) -> None:
    """The next task knows them by the event alone, and its node's token fetches them."""
    to = {"destination": {"type": "http", "url": f"{results.origin}/api/v1/results"}}
    for how in ("crash", "cancelled", "timeout", "both", "drained"):
        timeout = {"timeoutSec": 2} if how == "timeout" else {}
        orchestrator.dispatch("w1", SPEC | {"output": to} | timeout, how)
        pid = node.task_pid(how)
        until(lambda how=how: len(kept(node.results_dir / how).rows) == QUICK, f"{how} has rows")
        end_early(node, orchestrator, how, how, pid)
        end = orchestrator.wait_end(how)
        payload = end["payload"]
        assert payload["error_kind"] == ("crash" if how == "both" else how), end
        assert payload["rows"] == {"done": QUICK, "total": COUNT}
        assert payload["resume"] == {"url": f"{results.origin}/api/v1/results/{how}/files/rows.jsonl.gz"}
        assert payload["retryable"] is (how in ("crash", "both", "drained"))
        if how == "drained":
            break
        again = orchestrator.run("w1", FAST | {"resume": payload["resume"]}, task_id=f"{how}-goes-on")
        assert again["type"] == "TASK_SUCCEEDED", again
        assert node.result(f"{how}-goes-on")["reused"] == QUICK
        assert [item["index"] for item in node.result(f"{how}-goes-on")["items"]] == list(range(COUNT))


def test_a_failed_training_run_says_its_steps(node: Node, orchestrator: Orchestrator) -> None:
    orchestrator.dispatch("w1", SPEC, "trains")
    pid = node.task_pid("trains")
    folder = node.results_dir / "trains" / "checkpoints"
    folder.mkdir()
    notes = StepNotes(folder)
    notes.begin(4, 20)
    notes.advance(7)
    os.kill(pid, signal.SIGKILL)
    payload = orchestrator.wait_end("trains")["payload"]
    assert payload["steps"] == {"done": 7, "total": 20, "checkpointed": 4} == node.result("trains")["steps"]


def test_merged_children_have_rows_of_their_own(node: Node, orchestrator: Orchestrator) -> None:
    children = [{"task_id": f"c{n}", "spec": SPEC | {"count": count}} for n, count in ((1, 3), (2, COUNT), (3, 9))]
    orchestrator.dispatch("w1", SPEC | {"count": 2}, "parent", merged_children=children)
    pid = node.task_pid("parent")
    until(lambda: len(kept(node.results_dir / "c2").rows) == QUICK, "the second child has rows")
    os.kill(pid, signal.SIGKILL)
    payload = orchestrator.wait_end("parent")["payload"]
    assert payload["rows"] == {
        "done": 2 + 3 + QUICK,
        "total": 2 + 3 + COUNT + 9,
        "children": {
            "c1": {"done": 3, "total": 3, "resume": {"path": str(node.results_dir / "c1")}},
            "c2": {"done": QUICK, "total": COUNT, "resume": {"path": str(node.results_dir / "c2")}},
            "c3": {"done": 0, "total": 9},
        },
    }
    assert payload["resume"] == {"path": str(node.results_dir / "parent")}
    assert node.result("c2")["rows"] == {"done": QUICK, "total": COUNT}
    for child, reused in (("c1", 3), ("c2", QUICK), ("c3", 0)):
        spec = next(each["spec"] for each in children if each["task_id"] == child)
        assert orchestrator.run("w1", spec | {"row_s": 0}, task_id=child)["type"] == "TASK_SUCCEEDED"
        assert node.result(child)["reused"] == reused, child
    orchestrator.task_events.clear()
    fast = [each | {"spec": each["spec"] | {"row_s": 0}} for each in children]
    end = orchestrator.run("w1", FAST | {"count": 2}, task_id="parent", merged_children=fast)
    assert end["payload"]["resources"]["rows"]["reused"] == 2 + 3 + COUNT + 9
