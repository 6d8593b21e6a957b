"""Notifications to real HTTP receivers: signed, retried, kept over a SIGKILL, told by one node, in nobody's way."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.cli.findings import Level
from flowmesh.cli.main import cli, guarded
from flowmesh.cli.notify import check
from flowmesh.settings.load import load
from tests.kit.http_server import Answer, Received, Server, Stall
from tests.kit.support import Node, Orchestrator, RedisServer, short_dir, until

pytestmark = pytest.mark.redis
SECRET = "a secret of the receiver and the nodes"
PASSWORD = "p4ssw0rd-of-the-document"


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Late(Server):
    """A receiver that is started later, at an address that is known before."""

    def __init__(self, port: int) -> None:
        self.allow_reuse_address = True
        super().__init__()
        self.socket.close()
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server_address = ("127.0.0.1", port)
        self.server_bind()
        self.server_activate()


class Fleet:
    """Three nodes, a receiver that works, one that never answers, and one that is down."""

    def __init__(self) -> None:
        self.redis = RedisServer(keep=True)
        self.good, self.hung = Server(), Server(*[Stall()] * 100_000)
        self.down_port = free_port()
        self.home = short_dir()
        secret = self.home / "secret"
        secret.write_text(SECRET + "\n")
        secret.chmod(0o600)
        urls = [
            f"{self.good.url}/hooks/T0-very-secret-path-B1?x=1",
            f"http://127.0.0.1:{self.down_port}/",
            self.hung.url,
        ]
        self.config = (
            f'[notify]\nurl = {json.dumps(urls)}\nsecret_file = "{secret}"\ntimeout_s = 0.5\nnode_down_after_s = 1.5\n'
            'events = ["failed", "slot_closed", "slot_opened", "node_down", "node_up"]\n'
            "[results]\nmin_free_bytes = 0\n"
            '[task_types.misbehave]\nrunner = "tests.kit.runners_for_tests:MisbehavingRunner"\nenvironment = "light"\n'
        )
        self.nodes = {name: self.node(name) for name in ("w1", "w2", "w3")}
        self.peer = Orchestrator(self.redis)

    def node(self, name: str) -> Node:
        env = {"HEARTBEAT_INTERVAL_SEC": "0.2", "TZ": "UTC"}
        return Node(self.redis, worker_id=name, config=self.config, env=env)

    def told(self, kind: str, server: Server | None = None, **data: Any) -> list[Received]:
        """The messages of a kind that arrived."""
        with (server or self.good).lock:
            arrived = list((server or self.good).received)
        found = [each for each in arrived if each.json["type"] == kind]
        return [each for each in found if all(each.json["data"].get(key) == value for key, value in data.items())]

    def close(self) -> None:
        self.peer.close()
        for node in self.nodes.values():
            if node.process is not None:
                node.kill()  # its tasks need not end
            node.close()
        self.redis.close()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    with fleet.good, fleet.hung:
        try:
            for node in fleet.nodes.values():
                node.start(wait=False)
            for node in fleet.nodes.values():
                node.wait_status("IDLE")
            yield fleet
        finally:
            fleet.close()


def verified(received: Received, secret: str = SECRET) -> bool:
    """As docs/contract.md shows it."""
    headers = received.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + received.body
    expected = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    return hmac.compare_digest(f"v1,{expected}", headers["webhook-signature"])


def receiver(node: Node, number: int) -> dict[str, Any]:
    return dict(node.ask(op="status")["notify"][number])


def test_a_failed_task_is_told_signed_and_again_after_an_error(fleet: Fleet) -> None:
    with fleet.good.lock:
        fleet.good.plan += [Answer(500, b"not now"), Answer(429)]
        before = len(fleet.good.requests)
    spec = {"taskType": "misbehave", "do": "raise", "key": {"api_key": PASSWORD}}
    task = fleet.peer.dispatch("w1", spec)
    fleet.peer.wait_end(task)
    (received,) = until(lambda: fleet.told("task.failed", task_id=task), "it is told")
    assert len(fleet.good.requests) - before == 3
    assert verified(received)
    assert not verified(received, "another secret of 38 characters")
    message = received.json
    assert message["title"] == f"Task {task} (test) failed: error"
    assert message["data"]["verdict"] == "error"
    assert message["data"]["worker_id"] == "w1"
    assert message["data"]["retryable"] is False
    assert "the runner's own error" in message["text"]
    assert message["data"]["what_to_do"] in message["text"]
    assert PASSWORD not in received.body.decode()
    refused = fleet.peer.run("w1", {"taskType": "no such type"})["task_id"]
    (received,) = until(lambda: fleet.told("task.failed", task_id=refused), "a refusal is told")
    assert received.json["data"]["verdict"] == "bad_request"
    assert fleet.told("task.succeeded") == []


def test_receivers_that_are_down_or_hang_are_in_nobodys_way(fleet: Fleet) -> None:
    node = fleet.nodes["w1"]
    for _ in range(3):
        fleet.peer.run("w1", {"taskType": "misbehave", "do": "raise"})
    assert fleet.peer.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    down, hung = (until(lambda n=n: (it := receiver(node, n))["error"] and it, "it has an error") for n in (1, 2))
    assert "Connection refused" in down["error"]
    assert "no answer within 0.5 s" in hung["error"]
    assert down["waiting"] >= 3
    assert hung["waiting"] >= 3
    assert receiver(node, 0)["error"] is None
    until(lambda: receiver(node, 0)["waiting"] == 0, "the good one has all")
    status = node.ask(op="status")
    assert status["redis_up"]
    assert "very-secret" not in json.dumps(status)
    assert "very-secret" not in node.text()
    code = guarded(lambda: cli.main(["notify", "--state-dir", str(node.state_dir)], standalone_mode=False))
    assert code == 0


def test_what_waits_outlives_a_sigkill(fleet: Fleet) -> None:
    node = fleet.nodes["w2"]
    task = fleet.peer.run("w2", {"taskType": "misbehave", "do": "raise"})["task_id"]
    until(lambda: receiver(node, 1)["waiting"] == 1, "it waits for the receiver that is down")
    node.kill()
    with Late(fleet.down_port) as late:
        node.start()
        (received,) = until(lambda: fleet.told("task.failed", late, task_id=task), "it is told after the restart")
        assert verified(received)
        until(lambda: receiver(node, 1)["waiting"] == 0, "nothing waits any more")
        others = until(lambda: fleet.told("task.failed", task_id=task), "the other receiver has it, too")
        ids = [each.headers["webhook-id"] for each in others]
        assert set(ids) == {received.headers["webhook-id"]}, "one id, whoever gets it and however often"


def test_a_dead_node_is_told_by_one_node_and_a_closed_slot_by_its_own(fleet: Fleet) -> None:
    own, other = fleet.nodes["w1"], fleet.nodes["w3"]
    task = fleet.peer.dispatch("w3", {"taskType": "echo", "delaySec": 600})
    fleet.peer.wait_started(task)
    other.kill()
    own.results_dir.rename(own.home / "aside")
    own.results_dir.touch()
    (closed,) = until(lambda: fleet.told("slot.closed", worker_id="w1"), "it is told")
    assert "results.dir" in closed.json["text"]
    own.results_dir.unlink()
    (own.home / "aside").rename(own.results_dir)
    (down,) = until(lambda: fleet.told("node.down", workers=["w3"]), "it is told")
    assert down.json["data"]["tasks"] == [task]
    other.start()
    until(lambda: fleet.told("node.up", workers=["w3"]), "it is told")
    assert len(fleet.told("node.down", workers=["w3"])) == len(fleet.told("node.up", workers=["w3"])) == 1
    until(lambda: fleet.told("slot.opened", worker_id="w1"), "it is told")
    assert len(fleet.told("slot.closed")) == len(fleet.told("slot.opened")) == 1


def test_test_command_and_doctor(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.toml"
    file.write_text(fleet.config)
    arguments = ["notify", "--test", "--config", str(file)]
    assert guarded(lambda: cli.main(arguments, standalone_mode=False)) == 1, "two of three do not take it"
    told = capsys.readouterr().out
    assert f"{fleet.good.url}: delivered" in told
    assert "Connection refused" in told
    assert "very-secret" not in told
    (received,) = fleet.told("test")
    assert verified(received)
    (fleet.home / "secret").chmod(0o644)
    found = {finding.text: finding.level for finding in check(load(file, {}).settings)}
    assert found[f"http://127.0.0.1:{fleet.down_port}: Connection refused"] is Level.BROKEN
    assert found[f"{fleet.home}/secret can be read by others"] is Level.WARN
    assert Level.OK in found.values()
