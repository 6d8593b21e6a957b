"""Where the node creates its tasks' cgroups: in the delegated cgroup, beside the node's own leaf if it has one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.processes import cgroup

OWN = cgroup.own_cgroup()
pytestmark = pytest.mark.skipif(
    OWN is None or not os.access(OWN / "cgroup.procs", os.W_OK),
    reason="needs a cgroup v2 hierarchy that this user may write to",
)


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup like one that systemd delegates, with the controllers that are available here."""
    assert OWN is not None
    folder = OWN / f"flowmesh-test-{os.getpid()}"
    (folder / "supervisor").mkdir(parents=True)
    yield folder
    for each in sorted(folder.glob("**/"), reverse=True):
        each.rmdir()


def prepared_in(group: Path, wanted: list[str]) -> str:
    """The folder and controllers that `prepare` gives a process in `group`; empty if it gives none."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            (group / "cgroup.procs").write_text("0")
            base = cgroup.prepare("probe", wanted)
            if base is not None:
                cgroup.Leaf.make(base, "1").join()
                os.write(writer, f"{base} {sorted(cgroup.controllers(base))}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        output = pipe.read()
    os.waitpid(pid, 0)
    return output


def test_beside_the_nodes_own_leaf_tasks_get_what_was_delegated(delegated: Path) -> None:
    available = sorted((delegated / "cgroup.controllers").read_text().split())
    assert prepared_in(delegated / "supervisor", available) == f"{delegated / 'flowmesh-probe'} {available}"


def test_without_such_a_leaf_tasks_are_below_the_node_and_have_no_controllers(delegated: Path) -> None:
    """A cgroup that contains processes cannot enable controllers for its children."""
    available = (delegated / "cgroup.controllers").read_text().split()
    assert prepared_in(delegated, available) == f"{delegated / 'flowmesh-probe'} []"
