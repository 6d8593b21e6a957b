"""Disk space: too little pauses the node, a task that fills a disk fails, and old results are removed if configured."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.execution.housekeeping.retention import Kept, choose
from flowmesh.execution.launch.disk_space import free_bytes_at, shortage
from tests.kit.http_server import Answer, Server
from tests.kit.support import Node, Orchestrator, RedisServer, short_dir, until

MIB = 1 << 20
TYPES = """
[task_types.model]
runner = "tests.kit.delivery_runners:ModelRunner"
environment = "light"

[task_types.fill]
runner = "tests.kit.delivery_runners:FillRunner"
environment = "light"
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")


@contextlib.contextmanager
def on_small_disk(
    server: RedisServer, name: str, config: str, size_mib: int = 24, *, word: str = "IDLE"
) -> Iterator[Node]:
    """A node whose results (`results`) or state folder (`s`) is on a disk of a few MiB.

    Args:
        word: the status that its worker has after the start.
    """
    home = short_dir()
    mount = home / name
    mount.mkdir(mode=0o700)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=700", "tmpfs", str(mount)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(home)
        pytest.skip(f"this system does not allow mounting a tmpfs: {done.stderr.strip()}")
    node = Node(server, config=config + TYPES, home=home)
    try:
        node.start(wait=False)
        node.wait_status(word)
        yield node
    except BaseException:
        print(node.text()[-6000:])
        raise
    finally:
        if node.process is not None:
            node.kill()
        subprocess.run(["umount", "-l", str(mount)], check=True)
        node.close()


@pytest.mark.redis
@needs_root
def test_too_little_room_pauses_the_node_until_there_is_more(
    redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    with on_small_disk(redis_server, "results", f"[results]\nmin_free_bytes = {8 * MIB}\n") as node:
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
        filler = node.results_dir / "filler"
        filler.write_bytes(bytes(20 * MIB))
        node.wait_status("DEGRADED")
        waits = orchestrator.dispatch("w1", {"taskType": "echo"})
        until(lambda: node.ask(op="status")["queued"] == 1, "it is accepted and queued")
        (worker,) = node.ask(op="status")["workers"]
        assert "results.min_free_bytes" in worker["reason"]
        assert str(node.results_dir) in worker["reason"]
        assert orchestrator.of_task(waits) == []
        filler.unlink()
        assert orchestrator.wait_end(waits)["type"] == "TASK_SUCCEEDED"
        node.wait_status("IDLE")


@pytest.mark.redis
@needs_root
def test_the_look_before_a_launch_puts_the_task_back(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    """The first task leaves too little space for the second, which starts as soon as the first has ended."""
    with on_small_disk(redis_server, "results", f"[results]\nmin_free_bytes = {16 * MIB}\n") as node:
        first = orchestrator.dispatch("w1", {"taskType": "model", "kilobytes": 5 * 1024})
        second = orchestrator.dispatch("w1", {"taskType": "echo"})
        assert orchestrator.wait_end(first)["type"] == "TASK_SUCCEEDED"
        node.wait_status("DEGRADED")
        assert orchestrator.of_task(second) == []
        assert [task["state"] for task in node.ask(op="status")["tasks"]] == ["queued"]
        shutil.rmtree(node.results_dir / first)
        assert orchestrator.wait_end(second)["type"] == "TASK_SUCCEEDED"


@pytest.mark.redis
@needs_root
def test_tasks_do_not_wait_for_room_for_ever(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    settings = f"[results]\nmin_free_bytes = {100 * MIB}\nwait_for_room_s = 0.5\n"
    with on_small_disk(redis_server, "s", settings, word="DEGRADED") as node:
        end = orchestrator.run("w1", {"taskType": "echo"})
        assert (end["type"], end["payload"]["error_kind"], end["payload"]["retryable"]) == (
            "TASK_FAILED", "node_fault", True,
        )  # fmt: skip
        assert "node.state_dir" in end["error"]
        assert "results.min_free_bytes" in end["error"]
        assert node.stop() == 0


@pytest.mark.redis
@needs_root
@pytest.mark.parametrize(("disk", "where"), [("results", "out"), ("s", "tmp")])
def test_a_disk_that_a_task_fills_is_its_own_clear_failure(
    redis_server: RedisServer, orchestrator: Orchestrator, disk: str, where: str
) -> None:
    with on_small_disk(redis_server, disk, "[results]\nmin_free_bytes = 0\n") as node:
        task = orchestrator.dispatch("w1", {"taskType": "fill", "where": where})
        end = orchestrator.wait_end(task)
        assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "error")
        folder = node.results_dir / task if where == "out" else node.state_dir / "tmp" / "1"
        assert end["error"].startswith(f"the disk is full: {folder} has 0 MiB left (OSError: ")
        with contextlib.suppress(FileNotFoundError):
            (node.results_dir / task / "filler").unlink()
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@pytest.mark.redis
@needs_root
def test_a_result_that_found_no_room_is_written_when_asked_again(
    redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    with on_small_disk(redis_server, "results", "[results]\nmin_free_bytes = 0\n") as node:
        task = orchestrator.dispatch("w1", {"taskType": "fill", "where": "out", "then": "succeed"})
        assert orchestrator.wait_end(task)["payload"]["error_kind"] == "delivery_failed"
        assert "No space left" in node.ask(op="deliver", task_id=task)["error"]
        (node.results_dir / task / "filler").unlink()
        assert node.ask(op="deliver", task_id=task)["ok"] is True
        assert node.result(task)["ok"] is True
        assert len(orchestrator.ends(task)) == 1


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    absent = tmp_path / "a" / "b"
    there, at_once = free_bytes_at(tmp_path), free_bytes_at(absent)
    assert there is not None
    assert at_once == pytest.approx(there, rel=0.1)
    assert shortage({"results.dir": absent}, 1) == ""
    told = shortage({"results.dir": absent}, 1 << 60)
    assert told.startswith(f"{absent} (results.dir) has ")


NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
kepts = st.lists(
    st.builds(
        lambda n, age, size: Kept(
            task_id=f"t{n}",
            folder=Path(f"/r/t{n}"),
            finished_at=NOW - datetime.timedelta(hours=age),
            size_bytes=size,
        ),
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.integers(0, 1000),
    )
)


@given(kepts, st.none() | st.integers(1, 50), st.none() | st.integers(0, 5000))
def test_no_more_goes_than_has_to(kept: list[Kept], days: int | None, limit: int | None) -> None:
    gone = choose(kept, days, limit, NOW)
    ordered = sorted(kept, key=lambda each: each.finished_at)
    assert gone == ordered[: len(gone)]
    stay = ordered[len(gone) :]

    def has_to(left: list[Kept]) -> bool:
        old = days is not None and bool(left) and NOW - left[0].finished_at > datetime.timedelta(days=days)
        return old or (limit is not None and sum(each.size_bytes for each in left) > limit)

    assert not has_to(stay)
    if gone:
        assert has_to([gone[-1], *stay])


@pytest.mark.redis
def test_old_results_go_and_nothing_else(orchestrator: Orchestrator, make_node) -> None:
    """With keep_bytes = 0 all finished results are removed. Running, undelivered and foreign folders stay."""
    node = make_node(start=False, config="[delivery]\ntotal_timeout_s = 0.5\n" + TYPES)
    stranger = node.results_dir / "not-ours"
    stranger.mkdir(parents=True)
    (stranger / "data").write_text("x")
    node.start()
    with Server(*[Answer(500)] * 100) as server:
        destination = {"type": "http", "url": f"{server.url}/r"}
        failed = orchestrator.dispatch("w1", {"taskType": "echo", "output": {"destination": destination}})
        assert orchestrator.wait_end(failed)["payload"]["error_kind"] == "delivery_failed"
    finished = orchestrator.dispatch("w1", {"taskType": "model", "kilobytes": 50})
    again = orchestrator.dispatch("w1", {"taskType": "echo"})
    for task in (finished, again):
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 5}, task_id=again)
    orchestrator.wait_started(running)
    node.kill()
    (node.home / "node.toml").write_text("[results]\nkeep_bytes = 0\n" + TYPES)
    node.start()
    until(lambda: not (node.results_dir / finished).exists(), "finished results are removed")
    until(lambda: node.text().count("old results removed") == 1 or None, "the removal is logged")
    assert f"task={finished}" in next(line for line in node.text().splitlines() if "old results removed" in line)
    assert (node.results_dir / running / "logs").is_dir()
    assert (node.results_dir / failed / "responses.json").exists()
    assert (stranger / "data").exists()
    until(lambda: len(orchestrator.ends(running)) == 2, "the running task succeeds")


@pytest.mark.redis
def test_old_results_go_where_the_results_folder_is_a_link(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(start=False, config="[results]\n")
    (node.home / "disk").mkdir()
    node.results_dir.symlink_to(node.home / "disk")
    node.start()
    merged = [{"task_id": "merged", "spec": {"taskType": "echo"}}]
    task = orchestrator.dispatch("w1", {"taskType": "echo"}, merged_children=merged)
    orchestrator.wait_end(task)
    assert (node.home / "disk" / task).is_dir()
    assert (node.home / "disk" / "merged").is_dir()
    assert node.stop() == 0
    (node.home / "disk" / ".removed-0" / "half").mkdir(parents=True)  # left by a node that was killed during a removal
    (node.home / "node.toml").write_text("[results]\nkeep_bytes = 0\n")
    node.start()
    until(lambda: list((node.home / "disk").iterdir()) == [], "finished results are removed")


@pytest.mark.redis
def test_results_stay_as_long_as_nobody_says_otherwise(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config="[results]\nkeep_days = 1.0\n")
    task = orchestrator.dispatch("w1", {"taskType": "echo"})
    orchestrator.wait_end(task)
    assert node.stop() == 0
    node.start()
    until(lambda: node.ask(op="status")["uptime_s"] > 2, "the node has had time to remove results")
    assert node.result(task)["ok"] is True
