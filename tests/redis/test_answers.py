"""Nobody is left without an answer: dispatches that cannot be read, and results that cannot be written as they are."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.kit.support import Node, Orchestrator

pytestmark = pytest.mark.redis
CONFIG = """
[redis]
stream = true
timeout_s = 1.0
[task_types.odd]
runner = "tests.kit.odd_runners:OddRunner"
environment = "light"
"""
DEEP = "[" * 5000 + "]" * 5000


def documents() -> dict[str, tuple[str, str]]:
    """By task id: a message without its braces' rest, and what its answer names."""
    spec = {"taskType": "echo"}
    return {
        "nan": (json.dumps({"spec": {**spec, "x": float("nan")}}), "NaN"),
        "infinity": (json.dumps({"spec": {**spec, "x": [float("-inf")]}}), "Infinity"),
        "half": (json.dumps({"spec": {**spec, "x": "\ud800"}}), "surrogate"),
        "deep": ('{"spec": {"taskType": "echo", "x": ' + DEEP + "}}", "too deep"),
        "list": ("[1, 2]", "task"),
        "text": ('"task"', "task"),
        "no-spec": ('{"spec": null}', "spec"),
        "huge": ('{"spec": {"taskType": "echo", "x": ' + "9" * 5000 + "}}", "range"),
    }


def test_each_unreadable_dispatch_is_answered_both_ways(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node(config=CONFIG)
    named = {}
    for way in ("channel", "stream"):
        for name, (task, word) in documents().items():
            task_id = f"{way}-{name}"
            message = f'{{"task_id": "{task_id}", "task": {task}, "assigned_worker": "w1", "dispatched_at": "{name}"}}'
            named[task_id] = name, word
            if way == "channel":
                orchestrator.redis.publish("tasks", message)
            else:
                orchestrator.redis.xadd("tasks:w1", {"message": message})
    for task_id, (name, word) in named.items():
        end = orchestrator.wait_end(task_id)
        assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "bad_request"), task_id
        assert word in end["error"], (task_id, end["error"])
        assert end["payload"]["dispatched_at"] == name
    raw = b'{"task_id": "bytes", "task": {"spec": {"x": "\xff"}}, "assigned_worker": "w1"}'
    orchestrator.redis.publish("tasks", raw)
    assert orchestrator.wait_end("bytes")["payload"]["error_kind"] == "bad_request"
    orchestrator.redis.publish("tasks", b'{"task": NaN, "assigned_worker": "w1"}')  # names no task
    orchestrator.redis.publish("tasks", b'{"task_id": "other", "task": NaN, "assigned_worker": "w2", "x": "w1"}')
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    assert orchestrator.ends("other") == []
    status = node.ask(op="status")
    assert (status["malformed"], status["refused"]) == (1, 2 * len(documents()) + 1)


def test_results_and_errors_arrive_whatever_they_hold(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node(config=CONFIG)
    end = orchestrator.run("w1", {"taskType": "odd", "do": "half_pair"}, task_id="odd-1")
    assert end["type"] == "TASK_SUCCEEDED"
    result = node.result("odd-1")
    assert (result["text"], result["joined"], result["by\ufffdname"]) == ("half \ufffd", "😀", [None])
    assert next(iter(end["payload"]["phases"])) == "phase \ufffd"
    end = orchestrator.run("w1", {"taskType": "odd", "do": "raise_half_pair"})
    assert end["payload"]["error_kind"] == "error"
    assert end["error"] == "ValueError: half \ufffd of it"
    for levels in (500, 900, 960, 5000):
        end = orchestrator.run("w1", {"taskType": "odd", "do": "deep", "levels": levels})
        assert end["payload"].get("error_kind") in (None, "error"), (levels, end["error"])


def test_control_characters_are_escaped_on_the_way_out(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node(config=CONFIG)
    end = orchestrator.run("w1", {"taskType": "odd", "do": "raise_controls"}, task_id="odd-2")
    assert end["error"] == r"ValueError: red \x1b[31m text \x07 and \u202e back second line"
    assert not any(re.search(r"[\x00-\x08\x0b-\x1f\u202e]", line) for line in end["payload"]["log_tail"])
    assert "\x1b" not in node.text()
    assert b"\x1b]0;title\x07" in (node.results_dir / "odd-2/logs/stdout.log").read_bytes()
