"""A node with more rights than its tasks: a link that a task creates must not redirect what the node writes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from flowmesh.execution.admission import accept
from flowmesh.execution.housekeeping.task_logs import bound_logs, finish_logs, log_tail
from flowmesh.execution.launch.preparation import prepare
from flowmesh.execution.layout import Layout, Owner
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot, SlotPlan
from flowmesh.processes.child_main import Start, run
from flowmesh.processes.limits import Limits
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import Fork
from flowmesh.settings.schema import Settings
from flowmesh.startup import environments
from tests.kit.http_server import Server
from tests.kit.support import Node, Orchestrator, short_dir, until

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]
CONFIG = """
[processes]
task_user = "nobody"
[task_types.link]
runner = "tests.kit.delivery_runners:LinkRunner"
environment = "light"
"""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
SECRET = b"root's own\rline\n" * 10_000


@pytest.fixture
def home() -> Iterator[Path]:
    folder = short_dir().resolve()  # pytest's tmp_path cannot be entered by other users
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def secret(home: Path) -> Path:
    path = home / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def as_nobody(work: Callable[[], object]) -> Iterator[None]:
    """Call `work` again and again in a process of the user nobody."""
    nobody = pwd.getpwnam("nobody")
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
        signal.alarm(60)
        while True:
            with contextlib.suppress(OSError):
                work()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def folder_of_nobody(path: Path) -> Path:
    path.mkdir(parents=True)
    os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
    return path


def test_a_log_that_is_swapped_for_a_link_leads_nowhere(home: Path, secret: Path) -> None:
    logs = folder_of_nobody(home / "task" / "logs")
    log, link = logs / "stderr.log", logs / "link"
    log.touch()
    log.chmod(0o666)
    link.symlink_to(secret)
    libc = ctypes.CDLL(None)

    def swap() -> None:
        """In turn: a log that is too large, a log with lines to fold, and a link to root's file."""
        for text in (b"x" * 200_000, b"y\ry\n"):
            with contextlib.suppress(OSError):
                log.write_bytes(text)
            for _ in range(20):
                libc.renameat2(AT_FDCWD, bytes(log), AT_FDCWD, bytes(link), RENAME_EXCHANGE)

    seen = set()
    with as_nobody(swap):
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            bound_logs([logs], 120_000)
            finish_logs(logs.parent, keep=True)
            seen.add("root" in log_tail(logs.parent))
    assert secret.read_bytes() == SECRET
    assert seen == {False}


def test_anothers_file_is_not_looked_after_under_a_second_name(home: Path, secret: Path) -> None:
    """A hard link, which a task can create if fs.protected_hardlinks is off."""
    logs = folder_of_nobody(home / "task" / "logs")
    (logs / "stderr.log").hardlink_to(secret)
    (told,) = bound_logs([logs], 120_000).values()
    assert "another user's file" in str(told)
    finish_logs(logs.parent, keep=True)
    assert log_tail(logs.parent) == ""
    assert secret.read_bytes() == SECRET


def test_a_log_that_is_swapped_with_its_folder_leads_nowhere(home: Path) -> None:
    logs, others = folder_of_nobody(home / "task" / "logs"), home / "others"
    os.chown(logs.parent, logs.stat().st_uid, -1)
    others.mkdir()
    (others / "stderr.log").write_bytes(SECRET)
    (home / "task" / "link").symlink_to(others)
    names = bytes(logs), bytes(home / "task" / "link")
    libc = ctypes.CDLL(None)
    with as_nobody(lambda: libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            bound_logs([logs], 120_000)
            finish_logs(logs.parent, keep=True)
            finish_logs(logs.parent, keep=False)
            assert log_tail(logs.parent) == ""
    assert (others / "stderr.log").read_bytes() == SECRET


def test_a_job_is_written_before_its_folder_is_given_away(home: Path, secret: Path) -> None:
    settings = Settings()
    for name in ("spool", "tmp", "results"):
        (home / name).mkdir(mode=0o711)
    layout = Layout(
        state_dir=home,
        results_dir=home / "results",
        work_dir=home,
        mark="test",
        base_env={},
        cgroup=None,
        processes=settings.processes,
        owner=Owner.named("nobody"),
    )
    spec = {"taskType": "echo"}
    task = {"apiVersion": "flowmesh/v1", "kind": "Task", "metadata": {"name": "test"}, "spec": spec}
    message = json.dumps({"task_id": "t-1", "task": task, "assigned_worker": "w1"}).encode()
    accepted = accept(
        message, settings=settings, catalogue=environments.plan(settings)[0], results_dir=layout.results_dir
    )
    slot: Slot[Run] = Slot(SlotPlan(name="slot", worker_id="w1"))
    attempts = range(1, 400)
    links = [layout.spool(attempt) / "job.json" for attempt in attempts]

    def plant() -> None:
        for link in links:
            with contextlib.suppress(OSError):
                link.symlink_to(secret)

    with as_nobody(plant):
        for attempt in attempts:
            prepare(layout, Run(attempt, accepted, slot))
    assert secret.read_bytes() == SECRET
    assert {stat.S_ISREG(link.lstat().st_mode) for link in links} == {True}


def test_a_child_opens_its_logs_behind_no_link(home: Path) -> None:
    """When the child opens its logs it is still root, but the folder belongs to the task's user already."""
    elsewhere, logs = home / "elsewhere", home / "task" / "logs"
    elsewhere.mkdir()
    logs.parent.mkdir()
    logs.symlink_to(elsewhere)
    fork = Fork(
        attempt=1,
        target="os:getpid",
        spool=str(home),
        cwd="/",
        stdout=str(logs / "stdout.log"),
        stderr=str(logs / "stderr.log"),
        env={},
        limits=Limits(uid=65534, gid=65534),
    )
    (ours, orders), (near, far) = socket.socketpair(), Pipe.pair()
    ours.send(msgspec.msgpack.encode(fork))
    start = Start(orders, far, None, os.getpid())
    if (pid := os.fork()) == 0:
        try:
            run(start)
        except NotADirectoryError:
            os._exit(7)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert list(elsewhere.iterdir()) == []
    for each in (ours, orders, near, far):
        each.close()


@pytest.mark.parametrize("over_http", [False, True], ids=["local", "http"])
def test_a_link_in_a_parents_place_is_not_followed(orchestrator: Orchestrator, make_node, over_http: bool) -> None:
    """A task's folder may be inside another task's folder, which creates a link there after the first was accepted."""
    node: Node = make_node(start=False, config=CONFIG)
    node.home.chmod(0o755)
    elsewhere = node.home / "elsewhere"
    (elsewhere / "t-2").mkdir(parents=True)
    node.start()
    orchestrator.dispatch("w1", {"taskType": "link", "name": "sub", "target": str(elsewhere)}, task_id="t-1")
    orchestrator.wait_started("t-1")
    with Server() as server:
        second = {"taskType": "echo", "output": {"destination": {"type": "local", "path": "t-1/sub"}}}
        if over_http:
            http = {"type": "http", "url": f"{server.url}/r"}
            merged = [{"task_id": "t-2", "spec": second}]
            orchestrator.dispatch(
                "w1", {"taskType": "echo", "output": {"destination": http}}, "t-3", merged_children=merged
            )
        else:
            orchestrator.dispatch("w1", second, task_id="t-2")
        waiting = "t-3" if over_http else "t-2"
        until(lambda: any(each["task_id"] == waiting for each in node.ask(op="status")["tasks"]), "it is accepted")
        (node.results_dir / "t-1" / "go").touch()
        assert orchestrator.wait_end("t-1")["type"] == "TASK_SUCCEEDED"
        end = orchestrator.wait_end(waiting)
    assert end["type"] == "TASK_FAILED"
    assert f"a link leads from it to {elsewhere}" in end["error"]
    assert str(node.results_dir / "t-1" / "sub") in end["error"]
    assert (elsewhere / "t-2").stat().st_uid == 0
    assert [path.name for path in elsewhere.rglob("*")] == ["t-2"]
