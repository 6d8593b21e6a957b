"""The node's log waits for nobody, and survives logrotate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis


class Unread(Node):
    """A node whose standard error is a pipe that nobody reads."""

    def start(self, *, wait: bool = True) -> Node:
        reader, writer = os.pipe()
        self.reader = reader
        opened = subprocess.Popen

        def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            return opened(command, **{**options, "stderr": writer})

        subprocess.Popen = popen  # type: ignore[misc, assignment]
        try:
            return super().start(wait=wait)
        finally:
            subprocess.Popen = opened  # type: ignore[misc]
            os.close(writer)


def test_standard_error_that_nobody_reads(orchestrator: Orchestrator, redis_server: Any) -> None:
    node = Unread(redis_server)
    try:
        node.start()
        for _ in range(12_000):  # each is a line of the log: far more than a pipe and the node's buffer hold
            orchestrator.redis.publish("tasks", b"w1 " + b"x" * 20)
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
        for _ in range(60_000 // 2000):
            orchestrator.redis.publish("tasks", b"x" * 20)
        status = node.ask(op="status")
        assert status["malformed"] >= 12_000
        assert node.stop(signal.SIGTERM) == 0
    finally:
        os.close(node.reader)
        node.close()


def test_the_log_file_is_followed_over_a_rotation(orchestrator: Orchestrator, make_node: Any, tmp_path: Path) -> None:
    log = tmp_path / "node.jsonl"
    make_node("--set", f"node.log_file={log}")
    orchestrator.run("w1", {"taskType": "echo"}, task_id="before")
    log.rename(moved := tmp_path / "node.jsonl.1")
    log.touch()  # logrotate's `create`
    orchestrator.run("w1", {"taskType": "echo"}, task_id="after-create")
    until(lambda: "after-create" in log.read_text(), "the new file gets the lines")
    assert "before" in moved.read_text()
    os.truncate(log, 0)  # logrotate's `copytruncate`
    orchestrator.run("w1", {"taskType": "echo"}, task_id="after-truncate")
    until(lambda: "after-truncate" in log.read_text(), "the truncated file gets the lines")
    assert all(json.loads(line) for line in log.read_text().splitlines())
    assert "\0" not in log.read_text()


def test_the_log_of_deliveries_is_bounded(make_node: Any) -> None:
    node: Node = make_node(start=False)
    log = node.state_dir / "log" / "delivery.log"
    log.parent.mkdir(parents=True)
    node.state_dir.chmod(0o700)
    with log.open("wb") as file:
        file.truncate(17 * 1024**2)
        file.seek(0, os.SEEK_END)
        file.write(b"the last line\n")
    node.start()
    until(lambda: log.read_bytes()[:11] == b"[flowmesh: ", "it is cut")
    until(lambda: log.read_bytes().endswith(b"the last line\n"), "its last part stays")
    assert log.stat().st_size < 8 * 1024**2
