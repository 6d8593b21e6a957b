"""The cgroup of an agent's command: real groups, in the version of cgroups that this system has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowmesh.processes.cgroup import Leaf, own_cgroup
from runners.agent import cgroups
from runners.agent.cgroups import Group
from runners.agent.command import Bounds
from runners.agent.sandbox import MODES, Mode, Sandbox, mode_works

MIB = 2**20
OWN = own_cgroup()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group(64 * MIB, 20)
    if not any(
        (folder / "memory.limit_in_bytes").exists() or (folder / "memory.max").exists() for folder in made.folders
    ):
        made.remove()
        pytest.skip("this user may make no cgroups with a memory limit here")
    yield made
    made.remove()
    assert made.folders == []


def inside(group: Group, code: str) -> subprocess.CompletedProcess[str]:
    files = [str(folder / "cgroup.procs") for folder in group.folders]
    join = f"from pathlib import Path\nfor file in {files}: Path(file).write_text('0')\n"
    return subprocess.run([sys.executable, "-c", join + code], capture_output=True, text=True, check=False)


def test_the_kernel_stops_what_uses_too_much_memory(group) -> None:
    assert inside(group, "bytearray(20 << 20)").returncode == 0
    assert group.oom_kills() == 0
    assert inside(group, "x = bytearray(200 << 20)").returncode == -9
    assert group.oom_kills() == 1


def test_memory_that_no_process_shows_counts(group) -> None:
    hidden = "import mmap\nm = [mmap.mmap(-1, 16 << 20) for _ in range(8)]\n"
    hidden += "for e in m:\n    e.write(b'x' * len(e)); e.madvise(mmap.MADV_DONTNEED)"
    assert inside(group, hidden).returncode == -9


def test_processes_are_bound_for_root_too(group) -> None:
    if not any((folder / "pids.max").exists() for folder in group.folders):
        pytest.skip("no pids controller here")
    ended = inside(group, "import os, time\nfor _ in range(30): os.fork() or time.sleep(1)")
    assert "BlockingIOError" in ended.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_command_is_in_its_group_and_the_group_goes_with_it(mode: Mode, tmp_path, group) -> None:
    if reason := mode_works(mode):
        pytest.skip(f"this system has no {mode}: {reason}")
    box = Sandbox(tmp_path / "work", Bounds(timeout_s=20, memory_bytes=80 * MIB, disk_bytes=20 * MIB), mode=mode)
    parents = {folder.parent for folder in group.folders}
    seen: set[Path] = set()

    def check() -> None:
        for folder in (each for parent in parents for each in parent.glob(f"{cgroups.JAIL}-{os.getpid()}-*")):
            if folder not in group.folders and "sleep" in names_in(folder):
                seen.add(folder.parent)

    assert box.run(["sleep", "0.3"], check).code == 0
    assert seen == parents
    left = {folder for parent in parents for folder in parent.glob(f"{cgroups.JAIL}-{os.getpid()}-*")}
    assert left == set(group.folders)


def names_in(folder: Path) -> list[str]:
    try:
        pids = (folder / "cgroup.procs").read_text().split()
        return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
    except OSError:
        return []


def test_what_dead_tasks_left_is_removed(group) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    for parent in {folder.parent for folder in group.folders}:
        left = parent / f"{cgroups.JAIL}-{dead.pid}-1"
        left.mkdir()
        another = Group(64 * MIB, 20)
        another.remove()
        assert not left.exists()


@pytest.fixture
def leaf() -> Iterator[Leaf]:
    """A task's leaf, as the node makes it, with the controllers that version 2 has here."""
    if OWN is None or not os.access(OWN / "cgroup.procs", os.W_OK):
        pytest.skip("needs a cgroup v2 hierarchy that this user may write to")
    base = OWN / f"flowmesh-test-{os.getpid()}"
    made = Leaf.make(base.parent / base.name, "x.1") if base.mkdir() is None else None
    assert made is not None
    for folder in (OWN, base):
        for controller in (folder / "cgroup.controllers").read_text().split():
            try:
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError:
                continue
    yield made
    made.kill()
    assert made.remove_within(5)
    base.rmdir()


def in_child(leaf: Leaf, act: Callable[[], object]) -> tuple[int, object]:
    """A process in the leaf that acts, then waits until the leaf is killed; and what `act` returned, as text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            leaf.join()
            os.write(writing, str(act()).encode() or b"-")
        finally:
            os.close(writing)
            os.execvp("sleep", ["sleep", "60"])
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pid, pipe.read()


def test_a_leaf_is_split_and_still_the_nodes_to_kill_and_remove(leaf, monkeypatch) -> None:
    available = tuple((leaf.path / "cgroup.controllers").read_text().split())
    if not available:
        pytest.skip("version 2 has no controllers here")
    monkeypatch.setattr(cgroups, "CONTROLLERS", available)

    def act() -> object:
        return [Group(64 * MIB, 20).folders[-1], Group(64 * MIB, 20).folders[-1]]

    pid, made = in_child(leaf, act)
    for number in (1, 2):
        assert f"{leaf.path}/{cgroups.JAIL}-{pid}-" in str(made), number
    assert leaf.pids() == [pid]
    assert (leaf.path / "task" / "cgroup.procs").read_text().split() == [str(pid)]
    assert leaf.populated()
    assert sorted(path.name.rpartition("-")[0] for path in leaf.path.iterdir() if path.is_dir()) == [
        f"{cgroups.JAIL}-{pid}", f"{cgroups.JAIL}-{pid}", "",
    ][::-1]  # fmt: skip
    leaf.kill()
    os.waitpid(pid, 0)
    assert leaf.remove_within(5)
    assert not leaf.path.exists()
    leaf.path.mkdir()


def test_a_leaf_of_the_task_user_can_be_split(leaf, monkeypatch) -> None:
    """It may make groups for its commands, but not raise its own limits, nor make many."""
    if os.geteuid() != 0:
        pytest.skip("only root gives a leaf away")
    available = tuple((leaf.path / "cgroup.controllers").read_text().split())
    if not available:
        pytest.skip("version 2 has no controllers here")
    monkeypatch.setattr(cgroups, "CONTROLLERS", available)
    leaf.delegate(65534, 65534)

    def act() -> object:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        writable = [path.name for path in leaf.path.iterdir() if path.is_file() and os.access(path, os.W_OK)]
        folders = Group(64 * MIB, 20).folders
        deep = cgroups._split(leaf.path) and not (leaf.path / "task" / "deeper").exists()
        return sorted(writable), len(folders), bool(deep)

    pid, told = in_child(leaf, act)
    assert told == "(['cgroup.procs', 'cgroup.subtree_control'], 1, True)"
    leaf.kill()
    os.waitpid(pid, 0)


def test_groups_that_are_not_a_nodes_are_left_alone() -> None:
    """As a login session's, where `flowmesh run` is started by hand."""
    if OWN is not None and OWN.parent.name.startswith(cgroups.OF_NODE):
        pytest.skip("these tests run in a node's task")
    assert all("memory" in str(path) or "pids" in str(path) for path in cgroups._parents())
