"""P4: every accepted task has exactly one terminal event. P5: tasks survive the death of their supervisor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.kit.clock_shim import Clock, compiler
from tests.kit.http_server import Server, Stall
from tests.kit.promises import (
    CONFIG,
    ISOLATIONS,
    WAITING,
    assert_serves,
    ended,
    leaves,
    let_go,
    mark_of,
    misbehave,
    pids_in,
    responses,
    wait_state,
)
from tests.kit.support import Node, Orchestrator, alive, below, until

pytestmark = pytest.mark.redis


@pytest.fixture(params=ISOLATIONS)
def node(make_node: Callable[..., Node], request: pytest.FixtureRequest) -> Node:
    return make_node("--set", f"processes.isolation={request.param}", config=CONFIG)


def wait_gone(pids: list[int], what: str) -> None:
    until(lambda: not any(alive(pid) for pid in pids), f"{what} is gone")


def assert_one_end_each(orchestrator: Orchestrator, ids: list[str]) -> None:
    orchestrator.hear(0.3)
    for task_id in ids:
        assert len(orchestrator.ends(task_id)) == 1, orchestrator.of_task(task_id)


def the_task(node: Node) -> int:
    """The pid of the only task's first process, found without a request to the node."""
    (server,) = node.servers()
    return int(until(lambda: [pid for pid in below(server) if alive(pid)], "the fork server has a child")[0])


def test_p4_p5_a_supervisor_killed_in_the_middle_of_ten_tasks(orchestrator: Orchestrator, node: Node) -> None:
    ids = [orchestrator.dispatch("w1", misbehave("wait_for", file="go on"))]
    ids += [orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.05, "n": n}) for n in range(9)]
    orchestrator.wait_started(ids[0])
    pid = node.task_pid(ids[0])
    for _ in range(3):
        wait_state(node, ids[9], "queued")
        node.kill()
        assert alive(pid), "the task continues without a supervisor"
        node.start()
    assert node.task_pid(ids[0]) == pid, "it is still the same process"
    (node.results_dir / ids[0] / "go on").touch()
    for task_id in ids:
        assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
    assert_one_end_each(orchestrator, ids)
    starts = [event["task_id"] for event in orchestrator.task_events if event["type"] == "TASK_STARTED"]
    assert list(dict.fromkeys(starts)) == ids, "in the order in which they were dispatched"
    assert_serves(orchestrator, node)


def test_p4_p5_killed_again_and_again_while_tasks_come_and_go(orchestrator: Orchestrator, node: Node) -> None:
    ids = [orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.03}) for _ in range(30)]
    until(lambda: len(node.ask(op="status")["tasks"]) > 10, "the tasks are accepted")
    for pause_s in (0.0, 0.05, 0.11, 0.17):
        time.sleep(pause_s)
        node.kill()
        node.start()
    for task_id in ids:
        assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
    distinct = {
        event["task_id"]: {e["ts"] for e in orchestrator.ends(event["task_id"])} for event in orchestrator.task_events
    }
    assert {task_id: len(times) for task_id, times in distinct.items()} == dict.fromkeys(ids, 1)
    assert_serves(orchestrator, node)


def test_p5_what_was_computed_while_no_supervisor_lived_is_delivered(orchestrator: Orchestrator, node: Node) -> None:
    began = time.monotonic()
    task_id = orchestrator.dispatch("w1", misbehave("escape", then="doze"))
    orchestrator.wait_started(task_id)
    pids = pids_in(node.results_dir / task_id / "pids")
    pids.append(the_task(node))
    node.kill()
    wait_gone(pids, "the task, with what it left")
    ran_s = time.monotonic() - began
    assert orchestrator.ends(task_id) == []
    node.start()
    end = orchestrator.wait_end(task_id)
    assert end["type"] == "TASK_SUCCEEDED", end
    assert 1.0 <= end["payload"]["runtime_sec"] <= ran_s, "without the time until it was recovered"
    assert responses(node, task_id)["ok"] is True
    assert end["payload"]["resources"]["processes_swept"] >= 3
    assert_one_end_each(orchestrator, [task_id])
    assert_serves(orchestrator, node)


def test_p5_a_crash_while_no_supervisor_lived_is_told_truthfully(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    orchestrator.wait_started(task_id)
    pid = the_task(node)
    node.kill()
    os.kill(pid, signal.SIGSEGV)
    wait_gone([pid], "the task")
    node.start()
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["exit"]["signal"]) == ("crash", "SIGSEGV")
    assert_one_end_each(orchestrator, [task_id])


def test_p5_an_adopted_task_can_be_cancelled(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    orchestrator.wait_started(task_id)
    node.kill()
    node.start()
    wait_state(node, task_id, "running")
    node.ask(op="cancel", task_id=task_id)
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["exit"]["code"]) == ("cancelled", 1), (
        "it received the cancel frame"
    )


@pytest.mark.skipif(compiler() is None, reason="needs a C compiler, for a clock that can be set")
@pytest.mark.parametrize("hours", [5, -5])
def test_p5_a_clock_that_is_set_meanwhile_is_nothing_to_an_adopted_task(
    orchestrator: Orchestrator, make_node: Callable[..., Node], hours: int
) -> None:
    node = make_node(start=False, config=CONFIG)
    clock = Clock(node.home / "clock")
    node.env |= clock.env
    node.start()
    task_id = orchestrator.dispatch("w1", misbehave("sleep", timeoutSec=600))
    orchestrator.wait_started(task_id)
    began = time.monotonic()
    node.kill()
    clock.set(hours * 3600)
    node.start()
    wait_state(node, task_id, "running")
    ran_s = time.monotonic() - began
    node.ask(op="cancel", task_id=task_id)
    end = orchestrator.wait_end(task_id)
    assert end["payload"]["error_kind"] == "cancelled", end
    assert ran_s <= end["payload"]["runtime_sec"] < ran_s + 60


def test_p5_a_cancel_outlives_the_supervisor_that_heard_it(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("deaf"))
    wait_state(node, task_id, "running", "deaf")
    assert node.ask(op="cancel", task_id=task_id)["state"] == "running"
    node.kill()
    node.start()
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["exit"]["signal"]) == ("cancelled", "SIGKILL")
    assert_one_end_each(orchestrator, [task_id])


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_p5_nobody_comes_back(orchestrator: Orchestrator, make_node: Callable[..., Node], isolation: str) -> None:
    flags = (f"processes.isolation={isolation}", "processes.adoption_timeout_s=3")
    node = make_node(*(f"--set={flag}" for flag in flags), config=CONFIG)
    task_id = orchestrator.dispatch("w1", misbehave("escape", then="sleep"))
    queued = orchestrator.dispatch("w1", {"taskType": "echo"})
    orchestrator.wait_started(task_id)
    pids = [*pids_in(node.results_dir / task_id / "pids"), the_task(node), *node.servers()]
    wait_state(node, queued, "queued")
    node.kill()
    wait_gone(pids, "the task and its fork server")
    node.start()
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("supervisor_lost", True)
    assert orchestrator.wait_end(queued)["type"] == "TASK_SUCCEEDED"
    assert_one_end_each(orchestrator, [task_id, queued])
    assert leaves(mark_of(node)) == []


def test_p5_the_settings_that_refuse_an_open_task(orchestrator: Orchestrator, node: Node) -> None:
    """The settings changed while there was no supervisor: without the task's type, the task is failed and killed."""
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    orchestrator.wait_started(task_id)
    pid = the_task(node)
    node.kill()
    (node.home / "node.toml").write_text("[processes]\nadoption_timeout_s = 3\n")
    node.start()
    end = orchestrator.wait_end(task_id)
    assert end["payload"]["error_kind"] == "node_fault"
    assert "misbehave" in end["error"]
    wait_gone([pid], "the task")
    assert_serves(orchestrator, node)


@pytest.mark.parametrize("how", ["signal", "command"])
def test_p5_a_hot_upgrade_keeps_the_task_and_its_process(orchestrator: Orchestrator, node: Node, how: str) -> None:
    task_id = orchestrator.dispatch("w1", WAITING)
    queued = orchestrator.dispatch("w1", {"taskType": "echo"})
    orchestrator.wait_started(task_id)
    wait_state(node, queued, "queued")
    pid, fds = node.task_pid(task_id), len(os.listdir(f"/proc/{node.pid}/fd"))
    if how == "signal":
        os.kill(node.pid, signal.SIGUSR2)
    else:
        assert node.ask(op="upgrade")["ok"]
    until(lambda: node.text().count("node started") == 2, "the new supervisor starts")
    until(lambda: node.text().count("subscribed") == 2, "the new supervisor is subscribed")
    assert node.task_pid(task_id) == pid
    assert node.ask(op="status")["pid"] == node.pid
    assert len(os.listdir(f"/proc/{node.pid}/fd")) <= fds + 2, "no descriptor of the old supervisor is still open"
    let_go(node, task_id)
    assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.wait_end(queued)["type"] == "TASK_SUCCEEDED"
    assert_one_end_each(orchestrator, [task_id, queued])
    assert node.stop() == 0


@pytest.mark.parametrize("adopted", [False, True])
def test_p5_a_killed_fork_server(orchestrator: Orchestrator, node: Node, adopted: bool) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("escape", then="sleep"))
    pids = pids_in(node.results_dir / task_id / "pids")
    pid = node.task_pid(task_id)
    if adopted:  # orphans of its fork server are then reparented to init, not to the supervisor
        node.kill()
        node.start()
        wait_state(node, task_id, "running")
    (server,) = node.servers()
    os.kill(server, signal.SIGKILL)
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("node_fault", True)
    assert not alive(pid)
    if node.ask(op="status")["isolation"] == "cgroup" or not adopted:
        assert not any(alive(each) for each in pids)
    else:  # pids[0] was executed with an empty environment: nothing shows that it is the task's
        assert not any(alive(each) for each in pids[1:])
        if alive(pids[0]):
            os.kill(pids[0], signal.SIGKILL)
    assert_serves(orchestrator, node)
    assert_one_end_each(orchestrator, [task_id])


def test_p5_a_task_that_kills_its_fork_server(orchestrator: Orchestrator, node: Node) -> None:
    end = orchestrator.run("w1", misbehave("patricide"))
    assert end["payload"]["error_kind"] == "node_fault"
    assert_serves(orchestrator, node)


def test_p5_supervisor_and_fork_server_killed_together(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("escape", then="sleep"))
    pids = pids_in(node.results_dir / task_id / "pids")
    isolation, servers = node.ask(op="status")["isolation"], node.servers()
    node.kill()
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    node.start()
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("supervisor_lost", True)
    known = pids if isolation == "cgroup" else pids[1:]
    assert not any(alive(each) for each in known)
    if alive(pids[0]):
        os.kill(pids[0], signal.SIGKILL)
    assert_serves(orchestrator, node)
    assert_one_end_each(orchestrator, [task_id])


def test_p4_a_killed_delivery_child_begins_again(orchestrator: Orchestrator, node: Node) -> None:
    with Server(Stall()) as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": server.url, "timeoutSec": 60}}}
        task_id = orchestrator.dispatch("w1", spec)
        until(lambda: server.requests, "the upload has started")
        (server_pid,) = [s["pid"] for s in node.ask(op="status")["servers"] if s["environment"] == "delivery"]
        (child,) = below(server_pid)
        os.kill(child, signal.SIGKILL)
        assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
        assert len(server.results()) == 1
    assert_one_end_each(orchestrator, [task_id])


@pytest.mark.parametrize("server_too", [False, True])
def test_p4_a_delivery_outlives_its_supervisor(orchestrator: Orchestrator, node: Node, server_too: bool) -> None:
    with Server(Stall()) as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": server.url, "timeoutSec": 60}}}
        task_id = orchestrator.dispatch("w1", spec)
        until(lambda: server.requests, "the upload has started")
        wait_state(node, task_id, "delivering")
        servers = node.servers()
        node.kill()
        if server_too:
            for pid in servers:
                os.kill(pid, signal.SIGKILL)
        node.start()
        if not server_too:
            wait_state(node, task_id, "delivering")
            assert len(server.requests) == 1, "the same child continues to send"
            node.ask(op="cancel", task_id=task_id)
        end = orchestrator.wait_end(task_id)
        assert end["type"] == ("TASK_SUCCEEDED" if server_too else "TASK_FAILED"), end
        runtime_s = end["payload"]["runtime_sec"]
    assert 0 < runtime_s < 5, "without the time that its delivery took"
    assert_one_end_each(orchestrator, [task_id])
    assert_serves(orchestrator, node)


@pytest.mark.slow
def _answers(node: Node) -> bool:
    try:
        return bool(node.ask(op="status"))
    except OSError:  # the socket of the earlier supervisor
        return False


@pytest.mark.parametrize("stop", ["cancel", "drain"])
def test_p4_a_stop_that_comes_before_the_new_supervisor_has_heard_its_fork_servers(
    orchestrator: Orchestrator, node: Node, stop: str
) -> None:
    """A fork server that is importing may answer seconds later."""
    running = orchestrator.dispatch("w1", misbehave("wait_for", file="go on"))
    orchestrator.wait_started(running)
    first, second = (orchestrator.dispatch("w1", {"taskType": "echo"}) for _ in range(2))
    wait_state(node, second, "queued")
    (server,) = node.servers()
    node.kill()
    os.kill(server, signal.SIGSTOP)
    try:
        node.start(wait=False)
        until(lambda: _answers(node), "the node answers")
        wait_state(node, second, "queued")
        if stop == "cancel":
            assert node.ask(op="cancel", task_id=first)["state"] == "queued"
        else:
            os.kill(node.pid, signal.SIGTERM)
        left = [running, second] if stop == "cancel" else [running]
        until(
            lambda: [task["task_id"] for task in node.ask(op="status")["tasks"]] == left, "the stopped task has ended"
        )
    finally:
        os.kill(server, signal.SIGCONT)
    assert orchestrator.wait_end(first)["payload"]["error_kind"] == ("cancelled" if stop == "cancel" else "drained")
    (node.results_dir / running / "go on").touch()
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    end = orchestrator.wait_end(second)
    if stop == "cancel":
        assert end["type"] == "TASK_SUCCEEDED"
        assert_serves(orchestrator, node)
    else:
        assert end["payload"]["error_kind"] == "drained"
        assert ended(node) == 0
    assert_one_end_each(orchestrator, [running, first, second])


def test_p5_tasks_of_slots_that_are_one_now(orchestrator: Orchestrator, make_node: Callable[..., Node]) -> None:
    """Both tasks continue and succeed, and the next one waits until the last of them has ended."""
    slots = "".join(f'[[slots]]\nname = "{name}"\ncpus = "{cpu}"\n' for cpu, name in enumerate("ab"))
    node = make_node(start=False, config=CONFIG + slots)
    node.start(wait=False)
    ids = []
    for worker in ("w1-a", "w1-b"):
        orchestrator.wait_worker_event("STATUS", status="IDLE", worker_id=worker)
        ids.append(orchestrator.dispatch(worker, misbehave("wait_for", file="go on")))
        orchestrator.wait_started(ids[-1])
    node.kill()
    (node.home / "node.toml").write_text(CONFIG)
    node.start(wait=False)
    orchestrator.wait_worker_event("REGISTER", status="RUNNING", worker_id="w1")
    until(orchestrator.is_heard, "the node subscribes, which follows its registration")
    later = orchestrator.dispatch("w1", {"taskType": "echo"})
    for task_id in ids:
        wait_state(node, later, "queued")
        (node.results_dir / task_id / "go on").touch()
        assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
        assert responses(node, task_id)["ok"] is True
    assert orchestrator.wait_end(later)["type"] == "TASK_SUCCEEDED"
    assert_one_end_each(orchestrator, [*ids, later])


def test_p5_a_fork_server_that_stays_silent_is_given_up(
    orchestrator: Orchestrator, make_node: Callable[..., Node]
) -> None:
    """The fork server is stopped (SIGSTOP) during the adoption: it must not report its tasks later.

    Ten seconds of waiting, so in one isolation only. What follows the kill is the same as in the test of both killed
    together, which has both.
    """
    node = make_node(config=CONFIG)
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    orchestrator.wait_started(task_id)
    pid, (server,) = the_task(node), node.servers()
    os.kill(server, signal.SIGSTOP)
    node.kill()
    node.start()
    assert orchestrator.wait_end(task_id)["payload"]["error_kind"] == "supervisor_lost"
    wait_gone([pid, server], "the task and its fork server")
    assert_serves(orchestrator, node)
    assert_one_end_each(orchestrator, [task_id])
