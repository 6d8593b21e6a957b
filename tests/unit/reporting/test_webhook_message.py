"""The text of a notification: bounded, harmless in a chat, and whole JSON whatever a task wrote."""

from __future__ import annotations

import json
from typing import Any

from flowmesh.reporting import webhook_message
from flowmesh.reporting.webhook_message import MAX_BYTES, of_node, of_slot, of_task, rendered
from flowmesh.tasks.advice import ADVICE
from flowmesh.tasks.history import Detail, Entry, Found
from flowmesh.tasks.verdicts import Kind

NODE = {"node_id": "n1", "host": "gpu-07"}


def found(verdict: str = "host_oom", **fields: object) -> Found:
    entry: dict[str, Any] = {
        "task_id": "t1",
        "worker_id": "w1",
        "type": "sft",
        "message": "out of memory",
        "finished_at": "2026-01-01",
    }
    detail: dict[str, Any] = {"evidence": "oom_kill +1", "log_tail": ("last line",), "retryable": True}
    return Found(
        entry=Entry(
            **(entry | {"verdict": verdict} | {k: v for k, v in fields.items() if k in Entry.__struct_fields__})
        ),
        detail=Detail(**(detail | {k: v for k, v in fields.items() if k in Detail.__struct_fields__})),
    )


def test_every_verdict_but_success_has_advice() -> None:
    assert set(ADVICE) == set(Kind) - {Kind.OK}


def test_a_failed_task_says_what_a_person_needs() -> None:
    kind, body = of_task(found(), NODE)
    message = json.loads(body)
    assert (kind, message["type"]) == ("failed", "task.failed")
    assert message["title"] == "Task t1 failed: host_oom"
    for part in ("out of memory", "oom_kill +1", "last line", "w1 (gpu-07)", ADVICE[Kind.HOST_OOM]):
        assert part in message["text"]
    assert message["data"]["log_tail"] == ["last line"]


def test_a_message_is_bounded_and_stays_json() -> None:
    huge = "\u20ac" * 100_000
    kind, body = of_task(
        found("ok", message=huge, evidence=huge, log_tail=(huge,) * 1000, name=huge, out_dir=huge, urls=(huge,) * 9),
        NODE,
    )
    assert kind == "succeeded"
    assert len(body) <= MAX_BYTES
    assert json.loads(body)["data"]["task_id"] == "t1"
    assert len(of_slot("w1", huge, NODE, fault="")[1]) <= MAX_BYTES
    many = [f"worker-{number}-{'x' * 100}" for number in range(10_000)]
    assert len(of_node(many, many, "2026", NODE, down=True)) <= MAX_BYTES


def test_a_task_alerts_nobody_and_writes_no_markup() -> None:
    hostile = "<!channel> @channel @here <https://evil|click> & \x1b[31m\nsecond"
    _, body = of_task(found(message=hostile), NODE)
    text = json.loads(rendered(body, "slack"))["text"]
    assert set(json.loads(rendered(body, "slack"))) == {"text"}
    assert "<" not in text
    assert "&lt;!channel&gt;" in text
    assert "@channel" not in text
    assert "\x1b" not in text
    assert rendered(body, "json") == body
    assert webhook_message.of_test(NODE)
