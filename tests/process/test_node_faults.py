"""Lasting faults of the node: tasks wait, the worker says why, and it goes on by itself when the fault is over."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import Node, Orchestrator, RedisServer, alive, short_dir, spares, until
from tests.process.test_environments import BODY, config, make_environment

pytestmark = pytest.mark.redis
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
NO_CHECK = "[results]\nmin_free_bytes = 0\n"


def reason_of(node: Node) -> str:
    (worker,) = node.ask(op="status")["workers"]
    return worker["reason"] or ""


def waits_and_runs(orchestrator: Orchestrator, node: Node, part: str, mend: Callable[[], object]) -> None:
    """A task that comes meanwhile waits, the worker says why, and the task runs after the repair."""
    task = orchestrator.dispatch("w1", {"taskType": "echo"})
    node.wait_status("DEGRADED")
    until(lambda: part in reason_of(node), f"the reason names {part!r}: {reason_of(node)!r}")
    in_hash = orchestrator.redis.hget("worker:w1", "degraded")
    assert in_hash is not None
    assert part in in_hash.decode()
    (fault, *_) = node.ask(op="status")["faults"]
    assert fault["workers"] == ["w1"]
    until(lambda: node.ask(op="status")["queued"] == 1, "the task is in the queue")
    assert orchestrator.of_task(task) == []
    mend()
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    node.wait_status("IDLE")
    assert not orchestrator.redis.hexists("worker:w1", "degraded")
    assert node.ask(op="status")["faults"] == []


def test_results_replaced_by_a_file_keep_tasks_waiting(orchestrator: Orchestrator, node: Node) -> None:
    def mend() -> None:
        node.results_dir.unlink()
        (node.home / "aside").rename(node.results_dir)

    for _ in range(2):
        node.results_dir.rename(node.home / "aside")
        node.results_dir.touch()
        waits_and_runs(orchestrator, node, "results.dir", mend)
    assert node.text().count("degraded, tasks wait:") == 2, "each time it is in the log once"


def test_what_can_be_made_again_is_made_again(orchestrator: Orchestrator, make_node) -> None:
    """As a cleaner of temporary folders does it: parts of the state folder, sockets, the lock, the results."""
    node: Node = make_node(config=MISBEHAVE)
    for folder in (node.state_dir / "spool", node.state_dir / "tmp", node.state_dir / "log", node.results_dir):
        shutil.rmtree(folder)
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED", folder
    run = node.state_dir / "run"
    server = next(run.glob("light-*.sock"))
    for path in (run / "control.sock", server, node.state_dir / "lock"):
        path.unlink()
        until(path.exists, f"{path.name} is made again")
    until(lambda: _answers(node), "the control socket answers")
    second = subprocess.run(
        [*_command(node), "--set=node.log_level=ERROR"], cwd=node.cwd, capture_output=True, check=False, timeout=60
    )
    assert second.returncode == 75, "the lock is held again"
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    pid = node.task_pid(task)
    shutil.rmtree(run)
    until(lambda: server.exists() and _answers(node), "the sockets are there again")
    node.kill()
    node.start()
    assert node.task_pid(task) == pid, "the fork server was found at its new socket"
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def _answers(node: Node) -> bool:
    with contextlib.suppress(OSError):
        return bool(node.ask(op="status")["ok"])
    return False


def _command(node: Node) -> list[str]:
    import sys

    return [sys.executable, "-m", "flowmesh.cli.supervisor", *node.flags()]


def test_a_part_of_the_state_folder_that_is_a_file_keeps_tasks_waiting(orchestrator: Orchestrator, node: Node) -> None:
    spool = node.state_dir / "spool"
    spool.rmdir()
    spool.touch()
    waits_and_runs(orchestrator, node, str(spool), spool.unlink)


def test_without_its_start_folder_tasks_run(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    node: Node = make_node(cwd=here)
    here.rmdir()
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    node.ask(op="recycle")  # a fork server that starts now
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@needs_root
def test_a_cgroup_that_somebody_removed_is_made_again(orchestrator: Orchestrator, node: Node) -> None:
    if node.ask(op="status")["isolation"] != "cgroup":
        pytest.skip("no cgroup v2 hierarchy that this user may write to")
    orchestrator.run("w1", {"taskType": "echo"})
    (server,) = node.servers()
    until(lambda: len(spares(server)) == 2, "its spares wait")
    own = _cgroup_of(server)
    until(lambda: all(_cgroup_of(spare) != own for spare in spares(server)), "they are in cgroups of their own")
    pid = spares(server)[0]
    base = Path(_cgroup_of(pid)).parent
    os.kill(server, signal.SIGSTOP)
    for spare in spares(server):
        os.kill(spare, signal.SIGKILL)
    for leaf in base.glob("*.*/"):
        until(lambda leaf=leaf: _removed(leaf), f"{leaf} is empty")
    base.rmdir()
    os.kill(server, signal.SIGCONT)
    end = orchestrator.run("w1", {"taskType": "echo"})
    assert end["type"] == "TASK_SUCCEEDED"
    assert base.is_dir()


def _cgroup_of(pid: int) -> str:
    from flowmesh.processes.cgroup import _mounts

    line = next(line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
    return str(_mounts("cgroup2")[-1] / line[3:].lstrip("/"))


def _removed(leaf: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, OSError):
        leaf.rmdir()
    return not leaf.exists()


def test_an_environment_that_breaks_and_is_mended(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", "only_there", BODY)
    node: Node = make_node(config=config(python, "only_there"))
    assert orchestrator.run("w1", {"taskType": "probe"})["type"] == "TASK_SUCCEEDED"
    module = next((tmp_path / "venv").rglob("only_there.py"))
    module.unlink()
    tasks = [orchestrator.dispatch("w1", {"taskType": "probe"}) for _ in range(2)]
    node.wait_status("DEGRADED")
    assert "only_there" in reason_of(node)
    until(lambda: b'"probe"' not in orchestrator.redis.hget("worker:w1", "env_json"), "the type is not offered")
    orchestrator.wait_worker_event("REGISTER", status="DEGRADED")
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED", "other types run"
    assert all(orchestrator.of_task(task) == [] for task in tasks)
    assert node.text().count("degraded, tasks wait:") == 1
    module.write_text(BODY)
    for task in tasks:
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    node.wait_status("IDLE")
    assert b'"probe"' in orchestrator.redis.hget("worker:w1", "env_json")


def test_an_interpreter_that_is_gone_is_waited_for(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", "only_there", BODY)
    node: Node = make_node(config=config(python, "only_there"))
    aside = python.with_name("aside")
    python.rename(aside)
    task = orchestrator.dispatch("w1", {"taskType": "probe"})
    node.wait_status("DEGRADED")
    assert f"cannot start {python}" in reason_of(node)
    aside.rename(python)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_a_task_that_waited_past_the_bound_goes_back(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config="[tasks]\nnode_fault_wait_s = 0.5\n")
    node.results_dir.rename(node.home / "aside")
    node.results_dir.touch()
    end = orchestrator.run("w1", {"taskType": "echo"})
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("node_fault", True)
    assert "results.dir" in end["error"]
    assert orchestrator.redis.hget("worker:w1", "status") == b"DEGRADED"


@contextlib.contextmanager
def locked(node: Node) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(node.state_dir / "journal.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_a_locked_journal_stops_neither_heartbeats_nor_the_task(orchestrator: Orchestrator, node: Node) -> None:
    running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.5})
    orchestrator.wait_started(running)
    with locked(node):
        missed = orchestrator.dispatch("w1", {"taskType": "echo"})
        until(lambda: "another program has locked it" in reason_of(node), "it says so")
        orchestrator.hear()
        orchestrator.worker_events.clear()
        for _ in range(3):
            orchestrator.wait_worker_event("HEARTBEAT", deadline_s=3)
            orchestrator.worker_events.clear()
        assert orchestrator.ends(running) == [], "a reader is never ahead of the journal"
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    orchestrator.wait_worker_event("UNREGISTER")
    node.wait_status("IDLE")
    assert orchestrator.of_task(missed) == [], "it was not taken; it is for the orchestrator to queue it again"
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_a_node_that_misses_every_dispatch_does_not_announce_itself_in_a_circle(
    orchestrator: Orchestrator, node: Node
) -> None:
    """An orchestrator queues again at UNREGISTER, and gives the task back to the only worker it has."""
    with locked(node):
        for _ in range(30):
            orchestrator.dispatch("w1", {"taskType": "echo"})
            orchestrator.hear(0.1)
        orchestrator.hear()
        announced = [event for event in orchestrator.worker_events if event["type"] == "REGISTER"]
        assert 1 <= len(announced) <= 4
        assert announced[-1]["status"] == "DEGRADED"
    node.wait_status("IDLE")


@pytest.mark.parametrize("busy", [True, False])
def test_a_forced_stop_ends_a_node_whose_journal_is_locked(orchestrator: Orchestrator, node: Node, busy: bool) -> None:
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
    orchestrator.wait_started(task)
    pid = node.task_pid(task)
    if not busy:
        node.ask(op="cancel", task_id=task, force=True)
        orchestrator.wait_end(task)
    with locked(node):
        orchestrator.dispatch("w1", {"taskType": "echo"})
        node.wait_status("DEGRADED", "RUNNING")
        until(lambda: node.ask(op="status")["faults"], "the journal's fault is known")
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        node.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in node.text(), "it drains")
        with contextlib.suppress(ProcessLookupError):
            node.process.send_signal(signal.SIGTERM)
        node.process.wait(60)
        assert not Path(f"/proc/{pid}").exists()
    if busy:
        node.start()
        end = orchestrator.wait_end(task)
        assert end["payload"]["error_kind"] in ("drained", "supervisor_lost", "node_fault")


def test_a_journal_that_somebody_deleted_is_made_again(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=MISBEHAVE)
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    for path in node.state_dir.glob("journal.sqlite*"):
        path.unlink()
    until((node.state_dir / "journal.sqlite").exists, "it is made again")
    until(lambda: not node.ask(op="status")["faults"], "the fault is over")
    pid = node.task_pid(task)
    node.kill()
    node.start()
    assert node.task_pid(task) == pid, "the new file has the task"
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


@contextlib.contextmanager
def on_tmpfs(server: RedisServer, name: str, options: str) -> Iterator[tuple[Node, Path]]:
    """A node whose results (`results`) or state folder (`s`) is a tmpfs of its own."""
    home = short_dir()
    mount = home / name
    mount.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(home)
        pytest.skip(f"this system does not allow mounting a tmpfs: {done.stderr.strip()}")
    node = Node(server, config=NO_CHECK, home=home)
    try:
        yield node.start(), mount
    except BaseException:
        print(node.text()[-6000:])
        raise
    finally:
        if node.process is not None:
            node.kill()
        subprocess.run(["umount", "-l", str(mount)], check=False, capture_output=True)
        node.close()


def remount(mount: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)


@needs_root
def test_results_read_only_out_of_inodes_and_unmounted(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    with on_tmpfs(redis_server, "results", "size=8m,nr_inodes=400,mode=700") as (node, mount):
        remount(mount, "ro")
        waits_and_runs(orchestrator, node, "read-only", lambda: remount(mount, "rw"))
        for number in range(400):
            try:
                (mount / f"filler-{number}").touch()
            except OSError:
                break
        filler = sorted(mount.glob("filler-*"))
        waits_and_runs(orchestrator, node, "inodes", lambda: [path.unlink() for path in filler])
        aside = node.home / "aside"
        aside.mkdir()
        subprocess.run(["mount", "--bind", str(mount), str(aside)], check=True)
        subprocess.run(["umount", str(mount)], check=True)
        waits_and_runs(
            orchestrator,
            node,
            "not mounted",
            lambda: subprocess.run(["mount", "--bind", str(aside), str(mount)], check=True),
        )
        subprocess.run(["umount", "-l", str(aside)], check=True)
        subprocess.run(["umount", "-l", str(mount)], check=True)
        assert list(mount.iterdir()) == [], "no task has written into the disk below"


@needs_root
def test_what_was_computed_is_delivered_when_the_results_disk_is_back(
    redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    with on_tmpfs(redis_server, "results", "size=8m,mode=700") as (node, mount):
        task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 1})
        orchestrator.wait_started(task)
        aside = node.home / "aside"
        aside.mkdir()
        subprocess.run(["mount", "--bind", str(mount), str(aside)], check=True)
        subprocess.run(["umount", "-l", str(mount)], check=True)
        node.wait_status("DEGRADED")
        until(lambda: node.ask(op="status")["tasks"][0]["state"] == "delivering", "it is being delivered")
        assert orchestrator.ends(task) == []
        subprocess.run(["mount", "--bind", str(aside), str(mount)], check=True)
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert node.result(task)["ok"] is True
        subprocess.run(["umount", "-l", str(aside)], check=True)
        subprocess.run(["umount", "-l", str(mount)], check=False)


def test_a_stale_control_socket_of_another_program_is_replaced(node: Node) -> None:
    path = node.state_dir / "run" / "control.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        inode = path.stat().st_ino
        until(lambda: path.exists() and path.stat().st_ino != inode, "the node's own is there again")
    assert node.ask(op="status")["ok"] is True


@needs_root
def test_a_full_state_disk_makes_tasks_wait_and_their_ends_come_when_there_is_room(
    redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    with on_tmpfs(redis_server, "s", "size=24m,mode=700") as (node, mount):
        running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 2})
        orchestrator.wait_started(running)
        with open(mount / "cache" / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        for _ in range(40):  # until the journal's reserve is used up
            orchestrator.dispatch("w1", {"taskType": "echo", "padding": "x" * 400_000})
            if any(fault["name"] == "journal" for fault in node.ask(op="status")["faults"]):
                break
        faults = [fault["name"] for fault in node.ask(op="status")["faults"]]
        assert "journal" in faults
        remount(mount, "size=64m")
        (mount / "cache" / "filler").unlink()
        assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
        node.wait_status("IDLE", "RUNNING")
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@needs_root
def test_a_state_disk_that_turns_read_only_degrades_and_a_forced_stop_ends(
    redis_server: RedisServer, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    """As the kernel makes a file system read-only after an error on its disk."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4 to make a small file system")
    image, home = tmp_path / "disk", short_dir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)], check=True)
    mount = home / "s"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-o", "loop,errors=remount-ro", str(image), str(mount)], capture_output=True, check=False
    )
    if done.returncode != 0:
        shutil.rmtree(home)
        pytest.skip("this system does not allow mounting a loop device")
    try:
        source = subprocess.run(["findmnt", "-no", "SOURCE", str(mount)], capture_output=True, text=True, check=True)
        break_it = Path("/sys/fs/ext4", Path(source.stdout.strip()).name, "trigger_fs_error")
        if not break_it.exists():
            pytest.skip("this kernel has no trigger_fs_error")
        mount.chmod(0o700)
        node = Node(redis_server, config=NO_CHECK, home=home).start()
        running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
        orchestrator.wait_started(running)
        pid = node.task_pid(running)
        break_it.write_text("1")
        orchestrator.hear()
        orchestrator.worker_events.clear()
        for _ in range(20):
            orchestrator.dispatch("w1", {"taskType": "echo"})
            orchestrator.hear(0.1)
        until(lambda: node.ask(op="status")["faults"], "it says so")
        announced = [event for event in orchestrator.worker_events if event["type"] == "REGISTER"]
        assert len(announced) <= 4
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        until(lambda: node.ask(op="status")["draining"], "it drains")
        node.process.send_signal(signal.SIGTERM)
        node.process.wait(60)
        assert not Path(f"/proc/{pid}").exists()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


def test_a_lost_outcome_is_the_nodes_fault(orchestrator: Orchestrator, node: Node) -> None:
    """Deleted between the task's end and the look at it: the task had said that it was there."""
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.5})
    orchestrator.wait_started(task)
    pid = node.task_pid(task)
    os.kill(node.process.pid, signal.SIGSTOP)
    outcomes = node.state_dir / "spool"
    until(lambda: list(outcomes.glob("*/outcome.json")), "the task has ended")
    until(lambda: not alive(pid), "its process has ended")
    for each in outcomes.glob("*/outcome.json"):
        each.unlink()
    os.kill(node.process.pid, signal.SIGCONT)
    end = orchestrator.wait_end(task)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("node_fault", True)
    node.wait_status("IDLE")
