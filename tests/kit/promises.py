"""Shared by the tests of the promises (docs/architecture.md): a node with short timeouts, and checks after a task."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.kit.support import Node, Orchestrator, alive, until

MISBEHAVE = """
[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"
"""
CONFIG = f"""
[tasks]
cancel_grace_s = 0.5
term_grace_s = 0.5

[processes]
adoption_timeout_s = 20
{MISBEHAVE}"""
ISOLATIONS = ("auto", "subreaper")


def misbehave(do: str, **fields: Any) -> dict[str, Any]:
    """The spec of a task that does `do` (see MisbehavingRunner)."""
    return {"taskType": "misbehave", "do": do, **fields}


WAITING = misbehave("wait_for", file="go on")
"""Runs until `let_go`, however slow the machine is."""


def let_go(node: Node, task_id: str) -> None:
    (node.results_dir / task_id / WAITING["file"]).touch()


def mark_of(node: Node) -> str:
    """The node's id, which is part of FLOWMESH_ATTEMPT in the environment of every program that its tasks execute."""
    import sqlite3

    with sqlite3.connect(f"file:{node.state_dir / 'journal.sqlite'}?mode=ro", uri=True) as journal:
        return str(journal.execute("SELECT value FROM facts WHERE name = 'node_id'").fetchone()[0])


def of_tasks(mark: str) -> list[int]:
    """Live processes with the FLOWMESH_ATTEMPT of one of the node's attempts in their environment."""
    needle = f"FLOWMESH_ATTEMPT={mark}:".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                environ = Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue
            if needle in environ:
                found.append(int(name))
    return [pid for pid in found if alive(pid)]


def pids_in(path: Path) -> list[int]:
    """The pids that a task wrote to a file, once the file is complete."""
    until(lambda: path.exists() and path.read_text().endswith("\n"), f"{path.name} is written")
    return [int(word) for word in path.read_text().split()]


def leaves(mark: str) -> list[str]:
    """Names of the cgroups that the node's tasks still have, without those of children that wait for a task."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    roots = [Path(left.split()[4]) for left, right in mounts if right.startswith("cgroup2 ")]
    ours = [line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")]
    folders = [root / own / f"flowmesh-{mark}" for root in roots for own in ours]
    return sorted(path.name for folder in folders for path in folder.glob("*/") if not _waits_for_a_task(path))


def _waits_for_a_task(leaf: Path) -> bool:
    """Whether the cgroup's only process is a spare child, by its name. A new cgroup is empty for a moment."""
    names: set[str] = set()

    def settled() -> bool:
        nonlocal names
        with contextlib.suppress(OSError):
            names = {
                Path("/proc", pid, "comm").read_text().strip() for pid in (leaf / "cgroup.procs").read_text().split()
            }
        return bool(names) or not leaf.exists()

    with contextlib.suppress(AssertionError):
        until(settled, "a process is in it, or it is removed", 1.0)
    return names == {"flowmesh-spare"} or not leaf.exists()


def responses(node: Node, task_id: str) -> dict[str, Any]:
    return dict(json.loads((node.results_dir / task_id / "responses.json").read_text()))


def ended(node: Node) -> int:
    assert node.process is not None
    try:
        return node.process.wait(30)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the node did not exit:\n{node.text()[-3000:]}") from None


def assert_serves(orchestrator: Orchestrator, node: Node) -> None:
    """The next task runs, and the slot is idle after it."""
    end = orchestrator.run(node.worker_id, {"taskType": "echo"})
    assert end["type"] == "TASK_SUCCEEDED", end
    until(lambda: node.ask(op="status")["tasks"] == [], "the node has no tasks left")
    (worker,) = node.ask(op="status")["workers"]
    assert worker["task_id"] is None


def wait_state(node: Node, task_id: str, state: str, phase: str | None = None) -> dict[str, Any]:
    """The task's entry in the node's status, once it is in this state (and phase)."""

    def there() -> dict[str, Any] | None:
        for task in node.ask(op="status")["tasks"]:
            if task["task_id"] == task_id and task["state"] == state and phase in (None, task["phase"]):
                return dict(task)
        return None

    return dict(until(there, f"{task_id} is {state} {phase or ''}"))
