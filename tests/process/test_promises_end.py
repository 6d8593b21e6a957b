"""P1: nothing outlives a task. P3: the node survives every task. P6: the verdict rests on evidence."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.promises import (
    CONFIG,
    ISOLATIONS,
    assert_serves,
    leaves,
    mark_of,
    misbehave,
    of_tasks,
    pids_in,
    responses,
    wait_state,
)
from tests.kit.support import (
    Node,
    Orchestrator,
    RedisServer,
    alive,
    running,
    until,
)

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module", params=ISOLATIONS)
def node_and_peer(request: pytest.FixtureRequest) -> Iterator[tuple[Node, Orchestrator]]:
    """One node for the whole module: it must survive all its tests."""
    with contextlib.closing(RedisServer()) as server, contextlib.closing(Orchestrator(server)) as peer:
        node = Node(server, "--set", f"processes.isolation={request.param}", config=CONFIG)
        with running(node):
            yield node, peer
            assert node.process is not None
            assert node.process.poll() is None, node.text()
            assert "Traceback" not in node.text()


@pytest.fixture
def node(node_and_peer: tuple[Node, Orchestrator]) -> Node:
    return node_and_peer[0]


@pytest.fixture
def peer(node_and_peer: tuple[Node, Orchestrator]) -> Orchestrator:
    return node_and_peer[1]


def assert_nothing_left(node: Node, pids: list[int]) -> None:
    """Nothing of a task is left when its terminal event is sent. Processes and cgroups are checked without a wait."""
    assert [pid for pid in pids if alive(pid)] == []
    mark = mark_of(node)
    assert of_tasks(mark) == []
    assert leaves(mark) == []
    until(lambda: os.listdir(node.state_dir / "tmp") == [], "the task's TMPDIR is removed")
    until(lambda: os.listdir(node.state_dir / "spool") == [], "the task's spool folder is removed")


def test_p1_nothing_outlives_a_task_that_succeeded(node: Node, peer: Orchestrator) -> None:
    end = peer.run(node.worker_id, misbehave("escape"))
    assert end["type"] == "TASK_SUCCEEDED", end
    pids = responses(node, end["task_id"])["pids"]
    assert len(pids) == 3
    assert_nothing_left(node, pids)
    assert end["payload"]["resources"]["processes_swept"] >= 3
    assert end["payload"]["resources"]["gone_ms"] < 5000


def test_p1_nothing_outlives_a_task_whose_first_process_was_killed(node: Node, peer: Orchestrator) -> None:
    task_id = peer.dispatch(node.worker_id, misbehave("escape", then="sleep"))
    pids = pids_in(node.results_dir / task_id / "pids")
    assert all(alive(pid) for pid in pids)
    os.kill(node.task_pid(task_id), signal.SIGKILL)
    end = peer.wait_end(task_id)
    assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "crash")
    assert_nothing_left(node, pids)


def test_p1_nothing_outlives_a_task_that_was_cancelled(node: Node, peer: Orchestrator) -> None:
    task_id = peer.dispatch(node.worker_id, misbehave("escape", then="sleep"))
    pids = pids_in(node.results_dir / task_id / "pids")
    assert node.ask(op="cancel", task_id=task_id)["ok"]
    assert peer.wait_end(task_id)["payload"]["error_kind"] == "cancelled"
    assert_nothing_left(node, pids)


@pytest.mark.parametrize("then", ["return", "die"])
def test_p1_nothing_outlives_a_task_that_hops_from_pid_to_pid(node: Node, peer: Orchestrator, then: str) -> None:
    """Each process forks its successor and exits, so every list of its pids is outdated at once."""
    end = peer.run(node.worker_id, misbehave("hop", then=then))
    assert end["type"] == ("TASK_SUCCEEDED" if then == "return" else "TASK_FAILED"), end
    beat = node.results_dir / end["task_id"] / "beat"
    assert_nothing_left(node, [])
    size = beat.stat().st_size
    assert size > 0
    assert_serves(peer, node)
    assert beat.stat().st_size == size, "the task's processes no longer write"


def test_p1_what_a_task_left_in_tmp_is_gone(node: Node, peer: Orchestrator) -> None:
    end = peer.run(node.worker_id, misbehave("tmp"))
    assert responses(node, end["task_id"])["tmp"].startswith(str(node.state_dir / "tmp"))
    assert_nothing_left(node, [])


def test_p1_what_a_killed_task_left_in_shared_memory_is_gone(node: Node, peer: Orchestrator) -> None:
    end = peer.run(node.worker_id, misbehave("shm", then="die"))
    name = (node.results_dir / end["task_id"] / "shm").read_text()
    until(lambda: not Path("/dev/shm", name).exists(), "its block is removed")
    assert_nothing_left(node, [])


def test_p4_a_small_outcome_that_cannot_be_read_ends_its_task(node: Node, peer: Orchestrator) -> None:
    end = peer.run(node.worker_id, misbehave("forge", bytes=10))
    assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "crash"), end
    assert_serves(peer, node)


@pytest.mark.parametrize("size", [200_000, 2_000_000])
def test_p4_a_large_outcome_that_cannot_be_read_ends_its_task(
    make_node: Callable[..., Node], orchestrator: Orchestrator, size: int
) -> None:
    """The delivery finds that it is not valid. What is kept for another delivery stays on this node."""
    node = make_node(config=CONFIG)
    end = orchestrator.run(node.worker_id, misbehave("forge", bytes=size))
    assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "delivery_failed"), end
    assert_serves(orchestrator, node)


EVERY_WAY: list[tuple[dict[str, Any], str, int | None, str | None, str]] = [
    # task, error_kind, exit code, signal, part of the error
    (misbehave("segfault"), "crash", None, "SIGSEGV", "killed by SIGSEGV"),
    (misbehave("abort"), "crash", None, "SIGABRT", "killed by SIGABRT"),
    (misbehave("kill_self"), "crash", None, "SIGKILL", "killed by SIGKILL"),
    (misbehave("exit", code=0), "crash", 0, None, "exit status 0 and no result"),
    (misbehave("exit", code=7), "crash", 7, None, "exit status 7 and no result"),
    (misbehave("exec", command="/bin/true"), "crash", 0, None, "exit status 0 and no result"),
    (misbehave("sys_exit"), "error", 1, None, "SystemExit: 3"),
    (misbehave("raise"), "error", 1, None, "ValueError: the runner's own error with a second line"),
    (misbehave("not_a_dict"), "error", 1, None, "returned list, not a mapping"),
    (misbehave("fork_bomb", count=60), "crash", None, "SIGKILL", "killed by SIGKILL"),
    (misbehave("exec", command="/bin/sleep", timeoutSec=1), "timeout", None, "SIGTERM", "timed out after 1 s"),
    (misbehave("sleep", timeoutSec=0.5), "timeout", 1, None, "timed out after 0.5 s"),
]


@pytest.mark.parametrize(
    ("spec", "kind", "code", "signal_name", "words"), EVERY_WAY, ids=[way[0]["do"] for way in EVERY_WAY]
)
def test_p3_p6_a_bad_end_costs_only_its_own_task_and_is_told_with_evidence(  # noqa: PLR0917
    node: Node,
    peer: Orchestrator,
    spec: dict[str, Any],
    kind: str,
    code: int | None,
    signal_name: str | None,
    words: str,
) -> None:
    end = peer.run(node.worker_id, spec)
    assert end["type"] == "TASK_FAILED", end
    payload = end["payload"]
    assert payload["error_kind"] == kind
    assert words in end["error"]
    assert "\n" not in end["error"]
    assert (payload["exit"]["code"], payload["exit"]["signal"]) == (code, signal_name)
    assert payload["exit"]["evidence"]
    assert payload["retryable"] is (kind == "crash")
    failure = responses(node, end["task_id"])
    assert failure["ok"] is False
    assert failure["error"] == end["error"]
    assert failure["error_kind"] == kind
    assert_nothing_left(node, [])
    assert_serves(peer, node)


@pytest.mark.parametrize(
    "do", ["garbage", "huge_frame", "close_pipe", "stuff_pipe", "flood_pipe", "log_flood", "big_result", "escape"]
)
def test_p3_a_bad_neighbour_that_still_succeeds(node: Node, peer: Orchestrator, do: str) -> None:
    end = peer.run(node.worker_id, misbehave(do))
    assert end["type"] == "TASK_SUCCEEDED", end
    if do == "big_result":
        assert responses(node, end["task_id"])["items"] == ["y" * 1000] * 5000
    assert_nothing_left(node, [])
    assert_serves(peer, node)
    assert node.ask(op="status")["heartbeat_late_s"] < 1.0


def test_p3_a_child_that_ignores_all_but_sigkill(node: Node, peer: Orchestrator) -> None:
    task_id = peer.dispatch(node.worker_id, misbehave("deaf"))
    wait_state(node, task_id, "running", "deaf")
    assert node.ask(op="cancel", task_id=task_id) == {"ok": True, "state": "running"}
    end = peer.wait_end(task_id)
    assert end["payload"]["error_kind"] == "cancelled"
    assert end["payload"]["exit"]["signal"] == "SIGKILL"
    assert end["payload"]["retryable"] is False
    assert_nothing_left(node, [])
    assert_serves(peer, node)


def test_p3_a_stopped_child_can_be_cancelled(node: Node, peer: Orchestrator) -> None:
    task_id = peer.dispatch(node.worker_id, misbehave("sleep"))
    os.kill(node.task_pid(task_id), signal.SIGSTOP)
    node.ask(op="cancel", task_id=task_id)
    assert peer.wait_end(task_id)["payload"]["error_kind"] == "cancelled"
    assert_nothing_left(node, [])


def test_p6_the_last_lines_of_the_log_go_along(node: Node, peer: Orchestrator) -> None:
    end = peer.run(node.worker_id, misbehave("raise"))
    failure = responses(node, end["task_id"])
    assert "ValueError: the runner's own error" in failure["detail"]
    assert "Traceback" in "\n".join(failure["log_tail"])
    assert "ValueError: the runner's own error" in "\n".join(end["payload"]["log_tail"])
    end = peer.run(node.worker_id, misbehave("tell_secrets"))
    assert 2 <= len(end["payload"]["log_tail"]) <= 20
    assert len(json.dumps(end["payload"]["log_tail"])) < 5000, "events are small"


def test_p10_the_event_of_a_failed_task_tells_no_secret(make_node, orchestrator: Orchestrator) -> None:
    allowed = ("--set", "tasks.allow_env=MY_API_KEY", "--set", "tasks.pass_env=NODES_TOKEN")
    node = make_node(*allowed, config=CONFIG, env={"NODES_TOKEN": "hush-node"})
    spec = misbehave("tell_secrets") | {"env": {"MY_API_KEY": "hush-task"}}
    end = orchestrator.run(node.worker_id, spec)
    said = json.dumps(end)
    assert end["error"].startswith("ValueError: I have [hidden] and [hidden]")
    assert "in my log, too: [hidden] [hidden]" in "\n".join(end["payload"]["log_tail"])
    assert "hush" not in said


def test_p6_a_segfault_leaves_its_stack(node: Node, peer: Orchestrator) -> None:
    end = peer.run(node.worker_id, misbehave("segfault"))
    assert "do_segfault" in "\n".join(responses(node, end["task_id"])["log_tail"])


def test_p6_success_after_a_cancel_that_crossed_it_is_success(node: Node, peer: Orchestrator) -> None:
    task_id = peer.dispatch(node.worker_id, misbehave("busy", seconds=0.4))
    peer.wait_started(task_id)
    node.ask(op="cancel", task_id=task_id)  # the task does not check for cancels, and ends within the grace time
    assert peer.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
