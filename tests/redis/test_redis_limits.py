"""Documents over the limits of a real Redis: refused by the command, named by doctor, and no endless circle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from flowmesh.cli import redis_limits
from flowmesh.cli.main import main
from flowmesh.errors import EXIT_FAILURE, FlowMeshError
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis
SMALL = "pubsub 1048576 524288 10"


def test_limits_are_read_and_hold(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    client = redis_server.client()
    limits = redis_limits.read(client)
    assert limits.known
    assert limits.largest == 28 * 1024**2 - redis_limits.HEAD_BYTES
    client.config_set("client-output-buffer-limit", SMALL)
    largest = redis_limits.read(client).largest
    assert "cuts off" in redis_limits.check_size(client, b"x" * largest)
    with pytest.raises(FlowMeshError, match=r"1\.0 MiB"):
        redis_limits.check_size(client, b"x" * (largest + 1))
    pubsub = client.pubsub()
    pubsub.subscribe("here")
    until(lambda: pubsub.get_message(timeout=0.1), "subscribed")
    orchestrator.redis.publish("here", b"x" * largest)  # what is called the largest does arrive
    message = until(lambda: pubsub.get_message(timeout=0.1, ignore_subscribe_messages=True), "the message")
    assert len(message["data"]) == largest
    pubsub.close()
    client.execute_command("ACL", "SETUSER", "default", "-config|get")
    assert redis_limits.read(client) == redis_limits.RedisLimits()


def test_submit_and_doctor_name_the_limit(
    redis_server: RedisServer, make_node: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_node()
    redis_server.client().config_set("client-output-buffer-limit", SMALL)
    file = tmp_path / "task.yaml"
    file.write_text(json.dumps({"spec": {"taskType": "echo", "x": "y" * 1_500_000}}))
    with pytest.raises(SystemExit) as caught:
        main(["submit", str(file), "--redis", redis_server.url])
    assert caught.value.code == EXIT_FAILURE
    error = capsys.readouterr().err
    assert "1.4 MiB" in error
    assert "client-output-buffer-limit pubsub 1.0 MiB" in error
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [each for each in findings if each["area"] == "Redis" and "reach nodes" in each["text"]]
    assert found["level"] == "warn"


def test_a_document_that_cuts_the_node_off_does_not_circle(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node()
    orchestrator.redis.config_set("client-output-buffer-limit", SMALL)
    sent = 0
    end = time.monotonic() + 40
    while "announced again in 10 s at the earliest" not in node.text() and time.monotonic() < end:
        orchestrator.hear(0.05)
        registered = orchestrator.told.count("REGISTER")
        if registered > sent and node.ask(op="status")["redis_up"]:
            sent = registered
            orchestrator.dispatch("w1", {"taskType": "echo", "x": "y" * 3_000_000})
    text = node.text()
    assert "announced again in 10 s at the earliest" in text
    assert "client-output-buffer-limit" in text
    assert orchestrator.told.count("REGISTER") <= 4
