"""A running task's limits: hang timeout, log size, user, niceness, /dev/shm, cgroup; and logs that are dropped."""

from __future__ import annotations

import ctypes
import grp
import json
import os
import pwd
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from flowmesh.execution.housekeeping import watchdog
from flowmesh.execution.housekeeping.stack_dump import StackDump
from flowmesh.execution.layout import Owner
from flowmesh.processes import limits
from flowmesh.processes.limits import Limits
from flowmesh.processes.spares import MANY
from tests.kit.support import Node, Orchestrator, spares, until

pytestmark = pytest.mark.redis
T = TypeVar("T")
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_RESOURCE = 1, 2, 24
PR_CAPBSET_DROP = 24
CONFIG = """
[tasks]
cancel_grace_s = 0.5
term_grace_s = 0.5
{tasks}
[processes]
{processes}
[environments.own]
[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "{environment}"
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user or mount")


def config(*, tasks: str = "", processes: str = "", environment: str = "light") -> str:
    return CONFIG.format(tasks=tasks, processes=processes, environment=environment)


def test_a_silent_task_is_stopped_and_its_stacks_are_saved(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(tasks="hang_timeout_s = 1.0"))
    end = orchestrator.run("w1", {"taskType": "misbehave", "do": "deaf"}, task_id="silent")
    assert end["payload"]["error_kind"] == "hang"
    assert end["payload"]["retryable"] is True
    assert "tasks.hang_timeout_s" in end["error"]
    logs = node.results_dir / "silent" / "logs"
    stacks = (logs / "stacks.txt").read_text()
    assert "waits in" in stacks
    assert "do_deaf" in stacks  # Python's own stack, by faulthandler
    assert "do_deaf" in (logs / "stderr.log").read_text()
    spoken = orchestrator.run("w1", {"taskType": "echo", "delaySec": 2.5})
    assert spoken["type"] == "TASK_SUCCEEDED"  # it sends progress while it waits


def test_the_stacks_of_every_process_are_saved(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(tasks="hang_timeout_s = 3.0"))
    end = orchestrator.run("w1", {"taskType": "misbehave", "do": "wait_for_others"}, task_id="waits")
    assert end["payload"]["error_kind"] == "hang"
    stacks = (node.results_dir / "waits" / "logs" / "stacks.txt").read_text()
    spawned, program, stopped = (node.results_dir / "waits" / "others").read_text().split()
    told = dict(re.findall(r"^pid (\d+)(.*?)(?=^pid |\Z)", stacks, re.DOTALL | re.MULTILINE))
    assert {spawned, program, stopped} < told.keys()
    assert "sleep 600" in told[program]
    assert "File " not in told[program], "not a Python process, so no Python stacks"
    assert "when it was aborted" in told[spawned]
    assert "in spawned_waits" in told[spawned]
    assert "_stops_itself" in told[stopped]
    assert "in do_wait_for_others" in stacks


def test_stacks_are_not_written_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "logs").symlink_to(elsewhere)
    with subprocess.Popen(["sleep", "60"]) as process:
        StackDump(process.pid, tmp_path / "task").save()
        process.kill()
    assert list(elsewhere.iterdir()) == []


def test_a_log_that_grows_too_large_keeps_its_end(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(tasks="log_max_bytes = 1048576"))
    end = orchestrator.run("w1", {"taskType": "misbehave", "do": "log_flood", "megabytes": 20}, task_id="flood")
    assert end["type"] == "TASK_SUCCEEDED"
    log = node.results_dir / "flood" / "logs" / "stdout.log"
    assert log.stat().st_size <= 1048576
    assert b"bytes of this log were dropped here" in log.read_bytes()


def test_a_folder_that_its_task_locks_ends_no_watch(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(start=False, config=config())
    start_without_rights_to_all_files(node)
    task = orchestrator.dispatch("w1", {"taskType": "misbehave", "do": "lock_folder"}, task_id="locked")
    orchestrator.wait_started(task)
    until(lambda: "could not all be bounded or folded: .: Permission denied" in node.text(), "the watchdog has tried")
    time.sleep(watchdog.INTERVAL_S * 1.5)  # nothing shows its next round, which logs nothing
    assert node.text().count("could not all be bounded or folded") == 1, "it is logged once"
    node.kill()
    node.start()  # with all rights again, to end the task
    (tmp,) = (node.state_dir / "tmp").iterdir()
    (tmp / "unlock").touch()
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def start_without_rights_to_all_files(node: Node) -> None:
    """Start the node with the rights of a normal user.

    Capabilities removed from the bounding set are not regained by root's exec. That set is per thread, so only the
    thread that starts the node loses them.
    """

    def start() -> None:
        libc = ctypes.CDLL(None)
        for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            libc.prctl(PR_CAPBSET_DROP, right, 0, 0, 0)
        node.wrapper = ["env"]  # executed by this thread
        node.start()
        node.wrapper = []

    with ThreadPoolExecutor(1) as one:
        one.submit(start).result()


def test_logs_that_were_not_wanted_are_dropped_but_not_those_of_a_failure(
    orchestrator: Orchestrator, make_node
) -> None:
    node: Node = make_node(config=config())
    orchestrator.run("w1", {"taskType": "misbehave", "do": "write", "retainLogs": False}, task_id="good")
    orchestrator.run("w1", {"taskType": "misbehave", "do": "raise", "retainLogs": False}, task_id="bad")
    assert list((node.results_dir / "good" / "logs").iterdir()) == []
    assert "the runner's own error" in (node.results_dir / "bad" / "logs" / "stderr.log").read_text()


@needs_root
def test_tasks_run_as_another_user(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(start=False, config=config(processes='task_user = "nobody"\ntask_nice = 3'))
    node.home.chmod(0o755)
    node.start()
    # echo needs no further imports: that user may not be able to read this interpreter's folder
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600}, task_id="other")
    orchestrator.wait_started(task)
    pid = node.task_pid(task)
    uid = str(pwd.getpwnam("nobody").pw_uid)

    def status() -> dict[str, str]:
        return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())

    until(lambda: status()["Uid"].split() == [uid] * 4, "it has become that user")
    until(lambda: status()["NoNewPrivs"] == "1", "no_new_privs is set")
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.getpriority(os.PRIO_PROCESS, node.pid) + 3, 19)
    assert node.ask(op="cancel", task_id=task)["ok"] is True
    assert orchestrator.wait_end(task)["payload"]["error_kind"] == "cancelled"
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_an_unknown_task_user_is_a_settings_error(make_node) -> None:
    node: Node = make_node(start=False, config=config(processes='task_user = "no-such-user"'))
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 78
    assert "processes.task_user" in node.text()


@needs_root
def test_a_heavy_environments_tasks_have_a_shm_of_their_own(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(environment="own"))
    orchestrator.run("w1", {"taskType": "misbehave", "do": "shm", "then": "die"}, task_id="own")
    name = (node.results_dir / "own" / "shm").read_text()
    assert not Path("/dev/shm", name).exists()


def test_without_one_what_a_killed_task_left_is_swept(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(environment="own", processes="private_shm = false"))
    orchestrator.run("w1", {"taskType": "misbehave", "do": "shm", "then": "die"}, task_id="swept")
    name = (node.results_dir / "swept" / "shm").read_text()
    until(lambda: not Path("/dev/shm", name).exists(), "the block is gone", 10)


@needs_root
def test_a_node_that_lives_in_shm_does_not_hide_it_from_its_tasks(orchestrator: Orchestrator, make_node) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        node: Node = make_node("--set", f"results.dir={folder}", config=config(environment="own"))
        end = orchestrator.run("w1", {"taskType": "misbehave", "do": "write"})
        assert end["type"] == "TASK_SUCCEEDED", end
        assert Path(folder, end["task_id"], "responses.json").exists()
        assert node.stop() == 0


def test_an_owner_has_all_its_groups() -> None:
    """Access to a GPU's device file or to a data share may depend on a group."""
    name = next((each for entry in grp.getgrall() for each in entry.gr_mem if each in everybody()), "nobody")
    if os.geteuid() not in {0, pwd.getpwnam(name).pw_uid}:
        pytest.skip("only root can become another user")
    owner = Owner.named(name)
    assert {entry.gr_gid for entry in grp.getgrall() if name in entry.gr_mem} <= set(owner.groups)
    assert (owner.name, owner.gid in owner.groups) == (name, True)


def everybody() -> set[str]:
    return {entry.pw_name for entry in pwd.getpwall()}


@needs_root
def test_a_child_gets_the_groups_of_its_user_and_no_others() -> None:
    wanted = Limits(uid=65534, gid=65534, groups=(4, 27))
    assert in_a_child(lambda: limits.apply(wanted, os.getppid()), os.getgroups) == [4, 27]


@needs_root
def test_a_node_that_is_killed_early_already_does_not_lower_its_tasks() -> None:
    """As in a Kubernetes container: the score is high, and the process may not lower it."""

    def without_the_right() -> None:
        Path("/proc/self/oom_score_adj").write_text("900")
        drop_capability(CAP_SYS_RESOURCE)
        limits.apply(Limits(oom_score_adj=500), os.getppid())

    assert in_a_child(without_the_right, lambda: int(Path("/proc/self/oom_score_adj").read_text())) == 900
    raised = in_a_child(
        lambda: limits.apply(Limits(oom_score_adj=500), os.getppid()),
        lambda: int(Path("/proc/self/oom_score_adj").read_text()),
    )
    assert raised == 500


def drop_capability(number: int) -> None:
    """Remove a capability from the effective and permitted sets of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for at in (0, 1):
        sets[at] &= ~(1 << number)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def in_a_child(act: Callable[[], object], look: Callable[[], T]) -> T:
    """Fork, call `act` and then `look` in the child, and return what `look` returned."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            act()
            os.write(writer, json.dumps({"found": look()}).encode())
        except BaseException as error:  # noqa: BLE001 - reported by the parent
            os.write(writer, json.dumps({"failed": repr(error)}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = json.load(pipe)
    os.waitpid(pid, 0)
    assert "failed" not in told, told["failed"]
    found: T = told["found"]
    return found


def memory_group() -> Path | None:
    """A cgroup v1 in which a cgroup with a memory limit can be created; None if there is none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup ") and "memory" in right.split()[-1].split(","):
            own = next(each for each in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in each)
            return Path(left.split()[4]) / own.split(":", 2)[2].lstrip("/")
    return None


def move_servers(node: Node, group: Path) -> None:
    """Move the fork servers and their spare children into a cgroup."""
    for server in node.servers():
        ahead = Path(f"/proc/{server}/task/{server}/children")
        until(lambda: len(ahead.read_text().split()) == MANY, "spare children are forked")  # noqa: B023
        for pid in (str(server), *ahead.read_text().split()):
            (group / "cgroup.procs").write_text(pid)


@pytest.mark.parametrize("dying", [False, True])
def test_children_ahead_that_are_killed_cost_nobody_a_task(orchestrator: Orchestrator, make_node, dying: bool) -> None:
    """Also where they have not died yet when they get their task: stopped before, they read it only to be killed."""
    node: Node = make_node(config=config())
    (server,) = node.servers()
    for _ in range(2):
        until(lambda: len(spares(server)) == MANY, "spare children are forked")
        waiting = spares(server)
        if dying:
            for pid in waiting:
                os.kill(pid, signal.SIGSTOP)
            first = orchestrator.dispatch("w1", {"taskType": "echo"})
            until(lambda: len(spares(server)) > MANY, "one of them has the task, and another was forked in its place")
        for pid in waiting:
            os.kill(pid, signal.SIGKILL)
        ends = [orchestrator.run("w1", {"taskType": "echo"}) for _ in range(2)]
        ends.append(orchestrator.wait_end(first) if dying else orchestrator.run("w1", {"taskType": "echo"}))
        assert [end["type"] for end in ends] == ["TASK_SUCCEEDED"] * 3
    until(lambda: len(spares(server)) == MANY, "new spare children are forked")


@needs_root
@pytest.mark.skipif(memory_group() is None, reason="needs cgroups of version 1 with a memory controller")
def test_out_of_host_memory_is_told_by_the_kernels_own_count(orchestrator: Orchestrator, make_node) -> None:
    """If the task has no cgroup that counts OOM kills, the count of the fork server's cgroup is used."""
    parent = memory_group()
    assert parent is not None
    group = parent / f"flowmesh-test-{os.getpid()}"
    group.mkdir()
    try:
        node: Node = make_node(config=config())
        move_servers(node, group)
        (group / "memory.limit_in_bytes").write_text(str(200 << 20))
        end = orchestrator.run("w1", {"taskType": "misbehave", "do": "eat_memory"})
        assert end["payload"]["error_kind"] == "host_oom", end
        assert end["payload"]["retryable"] is True
        assert "oom_kill +1" in end["payload"]["exit"]["evidence"]
        killed = orchestrator.run("w1", {"taskType": "misbehave", "do": "kill_self"})
        assert killed["payload"]["error_kind"] == "crash", "another SIGKILL is not an OOM kill"
        assert node.stop() == 0
    finally:
        until(lambda: (group / "cgroup.procs").read_text() == "", "the cgroup is empty")
        group.rmdir()


@needs_root
def test_a_task_has_its_own_limits_of_memory_and_processes(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(
        start=False, config=config(processes="task_memory_max_bytes = 209715200\ntask_pids_max = 30")
    )
    node.start(wait=False)
    assert node.process is not None
    until(
        lambda: node.process.poll() is not None or "subscribed" in node.text(), "it runs, or has exited with an error"
    )
    if node.process.poll() == 78:
        assert "processes.task_" in node.text()
        assert "controller" in node.text()
        pytest.skip("no memory and pids controllers of cgroup v2 are delegated to this user")
    end = orchestrator.run("w1", {"taskType": "misbehave", "do": "eat_memory"})
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("host_oom", True)
    bomb = orchestrator.run("w1", {"taskType": "misbehave", "do": "fork_bomb", "count": 500})
    assert bomb["payload"]["resources"]["processes_swept"] < 30


def processes_group() -> Path | None:
    """A cgroup v1 in which a cgroup with a limit of processes can be created; None if there is none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup ") and "pids" in right.split()[-1].split(","):
            return Path(left.split()[4])
    return None


@needs_root
@pytest.mark.skipif(processes_group() is None, reason="needs cgroups of version 1 with a pids controller")
def test_tasks_wait_while_the_node_can_start_no_process_and_no_thread(orchestrator: Orchestrator, make_node) -> None:
    """As while a fork bomb uses up all processes."""
    parent = processes_group()
    assert parent is not None
    group = parent / f"flowmesh-test-{os.getpid()}"
    group.mkdir()
    try:
        node: Node = make_node(config=config())
        (group / "cgroup.procs").write_text(str(node.pid))
        move_servers(node, group)
        (group / "pids.max").write_text(str(int((group / "pids.current").read_text()) - MANY))
        for _ in range(MANY):
            assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED", (
                "it was forked before the limit"
            )
        waiting = [orchestrator.dispatch("w1", {"taskType": "echo"}) for _ in range(3)]
        node.wait_status("DEGRADED")
        reason = orchestrator.redis.hget("worker:w1", "degraded")
        assert b"fork: Resource temporarily unavailable" in (reason or b"")
        assert not any(orchestrator.ends(task) for task in waiting), "they wait: no task fails because of its node"
        (group / "pids.max").write_text("max")
        for task in waiting:
            assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert node.stop() == 0
    finally:
        until(lambda: (group / "cgroup.procs").read_text() == "", "the cgroup is empty")
        group.rmdir()
