"""P7: in Redis outages tasks continue, events are kept in order, and registration and subscription are restored."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from tests.kit import promises
from tests.kit.http_server import Server, Stall
from tests.kit.support import ROOT, Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis
QUICK = {"HEARTBEAT_INTERVAL_SEC": "1"}
CONFIG = "[redis]\ntimeout_s = 1.0\nhealth_check_interval_s = 1.0\n"


@pytest.fixture
def node(make_node) -> Node:
    return make_node(config=CONFIG, env=QUICK)


def test_p7_a_task_that_ends_while_redis_is_down_is_told_when_it_is_back(
    redis_server: RedisServer, orchestrator: Orchestrator, node: Node
) -> None:
    tasks = [orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.5, "n": n}) for n in range(3)]
    orchestrator.wait_started(tasks[0])
    redis_server.stop()
    until(lambda: node.ask(op="status")["tasks"] == [], "all tasks ended without Redis")
    waiting = node.ask(op="status")
    assert waiting["outbox"] >= 3
    assert waiting["redis_up"] is False
    for task in tasks:
        assert node.result(task)["ok"] is True
    redis_server.start()
    orchestrator.reconnect(redis_server)
    ends = [orchestrator.wait_end(task) for task in tasks]
    assert [end["type"] for end in ends] == ["TASK_SUCCEEDED"] * 3
    told = [e["task_id"] for e in orchestrator.task_events if e["type"] == "TASK_SUCCEEDED"]
    assert told == tasks
    node.wait_status("IDLE")
    assert orchestrator.redis.sismember("workers:ids", "w1")
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    until(lambda: node.ask(op="status")["outbox"] == 0, "all events are sent")


def test_p7_after_a_gap_the_node_announces_itself_anew_once_it_holds_no_task(
    orchestrator: Orchestrator, make_node
) -> None:
    """UNREGISTER makes the orchestrator queue again what it dispatched while the node was not subscribed."""
    node: Node = make_node(config=promises.MISBEHAVE)
    running = orchestrator.dispatch("w1", promises.WAITING)
    orchestrator.wait_started(running)
    cut_off(orchestrator)
    lost = orchestrator.dispatch("w1", {"taskType": "echo"})  # nobody is subscribed at this moment
    until(lambda: "subscribed again" in node.text(), "the subscription is back")
    promises.let_go(node, running)
    wait_announced_anew_after_the_end_of_its_task(orchestrator)
    node.wait_status("IDLE")
    again = orchestrator.dispatch("w1", {"taskType": "echo"}, task_id=lost)
    assert orchestrator.wait_end(again)["type"] == "TASK_SUCCEEDED"


def wait_announced_anew_after_the_end_of_its_task(orchestrator: Orchestrator) -> None:
    def told() -> list[str]:
        orchestrator.hear(0.05)
        return [kind for kind in orchestrator.told if kind in ("REGISTER", "UNREGISTER", "TASK_SUCCEEDED")]

    until(lambda: len(told()) == 4, "it is unregistered and registered again")
    assert told() == ["REGISTER", "TASK_SUCCEEDED", "UNREGISTER", "REGISTER"]


def test_p7_a_task_that_is_being_delivered_is_not_queued_again_after_a_gap(
    orchestrator: Orchestrator, node: Node
) -> None:
    """Its slot is free long before its terminal event; an UNREGISTER in between would make it run twice."""
    with Server(Stall()) as server:
        destination = {"type": "http", "url": server.url, "timeoutSec": 2}
        orchestrator.dispatch("w1", {"taskType": "echo", "output": {"destination": destination}})
        until(lambda: server.plan == [], "it is being delivered")
        cut_off(orchestrator)
        until(lambda: "subscribed again" in node.text(), "the subscription is back")
        wait_announced_anew_after_the_end_of_its_task(orchestrator)


def test_p7_an_idle_worker_is_announced_anew_while_its_neighbour_is_busy(orchestrator: Orchestrator, make_node) -> None:
    """It waits until the TASK_STARTED of its neighbour's task is sent, not for that task's end."""
    node = make_node(start=False, config=CONFIG + "".join(f'[[slots]]\nname = "{name}"\n' for name in "ab"), env=QUICK)
    node.start(wait=False)
    for worker in ("w1-a", "w1-b"):
        orchestrator.wait_worker_event("STATUS", worker_id=worker, status="IDLE")
    (server,) = node.servers()
    os.kill(server, signal.SIGSTOP)
    try:
        busy = orchestrator.dispatch("w1-b", {"taskType": "echo", "delaySec": 600})
        until(lambda: node.ask(op="status")["tasks"], "the task is accepted")
        orchestrator.redis.replicaof("127.0.0.1", 1)  # a replica refuses writes, so events wait
    finally:
        os.kill(server, signal.SIGCONT)
    until(lambda: node.ask(op="status")["outbox"] == 1, "the task has started meanwhile")
    cut_off(orchestrator)
    until(lambda: "subscribed again" in node.text(), "the subscription is back")
    orchestrator.redis.replicaof("NO", "ONE")
    orchestrator.wait_worker_event("UNREGISTER", worker_id="w1-a")
    assert not orchestrator.ends(busy)


def test_p7_what_was_dispatched_while_the_supervisor_was_restarted_is_queued_again(
    orchestrator: Orchestrator, node: Node
) -> None:
    """The orchestrator received no UNREGISTER, and its dispatch reached nobody."""
    running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 2})
    orchestrator.wait_started(running)
    node.kill()
    lost = orchestrator.dispatch("w1", {"taskType": "echo"})
    node.start()
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    orchestrator.wait_worker_event("UNREGISTER", worker_id="w1")
    node.wait_status("IDLE")
    assert orchestrator.wait_end(orchestrator.dispatch("w1", {"taskType": "echo"}, task_id=lost))
    assert node.stop() == 0
    node.start()
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    registrations = [kind for kind in orchestrator.told if kind in ("REGISTER", "UNREGISTER")]
    assert registrations[-2:] == [
        "UNREGISTER",
        "REGISTER",
    ]  # after an UNREGISTER at its stop the node need not send another
    assert "announced again" not in node.text().rpartition("unregistered")[2]


REFUSALS = {
    "full": ("CONFIG SET maxmemory 1", "used memory > 'maxmemory'", "CONFIG SET maxmemory 0"),
    "replica": ("REPLICAOF 127.0.0.1 1", "read only replica", "REPLICAOF NO ONE"),
    "locked": ("CONFIG SET requirepass hush", "Authentication required", "CONFIG RESETSTAT"),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_p7_a_redis_that_refuses_is_quoted_and_asked_again(orchestrator: Orchestrator, node: Node, how: str) -> None:
    breaks, told, mends = REFUSALS[how]
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 1})
    orchestrator.wait_started(task)
    orchestrator.redis.execute_command(*breaks.split())
    if how == "locked":
        cut_off(orchestrator, "bus")
    until(lambda: f"Redis refused the command ({told}" in node.text() or told in node.text(), "Redis' own text")
    until(lambda: any(told in each for each in node.ask(op="status")["redis_troubles"]), "and in the node's status")
    assert node.ask(op="status")["redis_up"] is False
    until(lambda: node.ask(op="status")["tasks"] == [], "the task ended meanwhile")
    if how != "full":  # a full Redis still takes commands that need no memory
        assert orchestrator.ends(task) == []
    orchestrator.redis.execute_command(*mends.split())
    if how == "locked":
        orchestrator.redis.config_set("requirepass", "")
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    until(lambda: node.ask(op="status")["redis_up"], "Redis works again")
    assert len([line for line in node.text().splitlines() if "heartbeats fail" in line]) <= 2
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def cut_off(orchestrator: Orchestrator, part: str = "sub") -> None:
    """Close a connection of the node, as a failing network does."""
    for client in orchestrator.redis.client_list():
        if client["name"] == f"flowmesh-w1-{part}":
            orchestrator.redis.client_kill_filter(_id=client["id"])


def test_p7_a_connection_that_says_nothing_is_found_out(
    redis_server: RedisServer, orchestrator: Orchestrator, node: Node
) -> None:
    """A stopped server keeps its connections open and does not answer, like a host that vanished."""
    assert redis_server.process is not None
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: node.ask(op="status")["redis_up"] is False, "the outage is detected", 15)
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    until(lambda: node.ask(op="status")["redis_up"], "Redis is reachable again", 20)
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


class Proxy:
    """A TCP proxy of a Redis on a unix socket. `stall` keeps its connections open, but forwards nothing more."""

    def __init__(self, server: RedisServer) -> None:
        self._path = str(server.path)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._stalls = 0
        self.stalled = False
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        self._stalls += 1
        self.stalled = True

    def resume(self) -> None:
        """Forward again, on new connections only."""
        self.stalled = False

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._path)
                self._sockets += [near, far]
                alive = -1 if self.stalled else self._stalls
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(*pair, alive), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, alive: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if alive == self._stalls:
                    target.sendall(data)
            if alive == self._stalls:
                target.shutdown(socket.SHUT_RDWR)


def test_p7_what_is_published_into_a_half_open_connection_is_queued_again(
    redis_server: RedisServer, orchestrator: Orchestrator, make_node
) -> None:
    """Redis sent the message to a connection whose other end is gone, and counts it as received."""
    with contextlib.closing(Proxy(redis_server)) as proxy:
        node = make_node("--redis-url", proxy.url, config=CONFIG, env=QUICK)
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
        proxy.stall()
        lost = orchestrator.dispatch("w1", {"taskType": "echo"})
        until(lambda: not node.ask(op="status")["redis_up"], "the outage is detected")
        until(lambda: "not subscribed" in node.text(), "also on the subscription's connection")
        proxy.resume()
        orchestrator.wait_worker_event("UNREGISTER", worker_id="w1")
        node.wait_status("IDLE")
        assert orchestrator.of_task(lost) == []
        orchestrator.dispatch("w1", {"taskType": "echo"}, task_id=lost)
        assert orchestrator.wait_end(lost)["type"] == "TASK_SUCCEEDED"


def test_p7_an_emptied_database_in_mid_task(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=promises.MISBEHAVE)
    task = orchestrator.dispatch("w1", promises.WAITING)
    orchestrator.wait_started(task)
    orchestrator.redis.flushall()
    until(lambda: orchestrator.redis.hget("worker:w1", "status") == b"RUNNING", "registered again as RUNNING")
    assert orchestrator.redis.hget("worker:w1", "extra_task_id") == task.encode()
    promises.let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    node.wait_status("IDLE")


def test_a_node_started_before_redis_waits_for_it(redis_server: RedisServer, make_node) -> None:
    redis_server.stop()
    node = make_node(start=False, config=CONFIG)
    node.start(wait=False)
    until(
        lambda: "Redis is unreachable" in node.text() or "not subscribed" in node.text(), "the missing Redis is logged"
    )
    redis_server.start()
    node.wait_status("IDLE")


def test_a_second_supervisor_on_the_same_folder_says_who_has_it(node: Node, make_node) -> None:
    second = make_node(start=False, worker_id="w2", home=node.home)
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(20) == 75
    assert f"another supervisor (pid {node.pid})" in node.text()


def test_settings_are_reloaded_under_a_running_task(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=CONFIG + promises.MISBEHAVE)
    pid = node.pid
    task = orchestrator.dispatch("w1", promises.WAITING)
    orchestrator.wait_started(task)
    child = node.task_pid(task)
    (node.home / "node.toml").write_text("[redis]\ntimeout_s = 'never'\n")
    node.process.send_signal(signal.SIGHUP)
    until(lambda: "not restarted, the node keeps" in node.text(), "the invalid settings are logged")
    (node.home / "node.toml").write_text(CONFIG + promises.MISBEHAVE + "[node]\ntags = ['new']\n")
    node.process.send_signal(signal.SIGHUP)
    until(lambda: orchestrator.redis.hget("worker:w1", "tags_json") == b'["new"]', "the new tags are registered")
    assert node.pid == pid
    assert node.task_pid(task) == child
    promises.let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert len(orchestrator.ends(task)) == 1


def test_flowmesh_upgrade_and_recycle_work_by_hand(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=promises.CONFIG)
    task = orchestrator.dispatch("w1", promises.WAITING)
    orchestrator.wait_started(task)
    command = [sys.executable, "-m", "flowmesh.cli.main"]
    place = ["--state-dir", str(node.state_dir)]
    recycled = subprocess.run([*command, "recycle", *place], capture_output=True, text=True, check=True, cwd=ROOT)
    assert recycled.stdout == "recycled: light\n"
    upgraded = subprocess.run([*command, "upgrade", *place], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"pid {node.pid}, continuing 1 task" in upgraded.stdout
    promises.let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_an_upgrade_that_takes_longer_than_the_node_had_run_is_seen(redis_server: RedisServer, make_node) -> None:
    """As on a busy machine: the new program has run for longer than the old one when it answers first."""
    node: Node = make_node(config="[redis]\ntimeout_s = 4.0\n")
    assert redis_server.process is not None
    redis_server.process.send_signal(signal.SIGSTOP)  # the new one asks it before it answers
    try:
        command = [sys.executable, "-m", "flowmesh.cli.main", "upgrade", "--state-dir", str(node.state_dir)]
        upgraded = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    assert upgraded.returncode == 0, upgraded.stderr
    assert f"pid {node.pid}, continuing 0 tasks" in upgraded.stdout
