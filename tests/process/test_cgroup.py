"""Where the node makes its tasks' cgroups: in what was delegated to it, beside its own leaf where it has one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.processes import cgroup

OWN = cgroup.own_cgroup()
pytestmark = pytest.mark.skipif(
    OWN is None or not os.access(OWN / "cgroup.procs", os.W_OK), reason="needs a cgroup v2 hierarchy that is ours"
)


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup as systemd would delegate it, with the controllers that this machine hands on."""
    assert OWN is not None
    folder = OWN / f"flowmesh-test-{os.getpid()}"
    (folder / "supervisor").mkdir(parents=True)
    yield folder
    for each in sorted(folder.glob("**/"), reverse=True):
        each.rmdir()


def prepared_in(group: Path, wanted: list[str]) -> str:
    """What `prepare` answers a process that lives in `group`."""
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
        told = pipe.read()
    os.waitpid(pid, 0)
    return told


def test_beside_the_nodes_own_leaf_tasks_get_what_was_delegated(delegated: Path) -> None:
    handed_on = sorted((delegated / "cgroup.controllers").read_text().split())
    assert prepared_in(delegated / "supervisor", handed_on) == f"{delegated / 'flowmesh-probe'} {handed_on}"


def test_without_such_a_leaf_tasks_are_below_the_node_and_have_no_controllers(delegated: Path) -> None:
    """A cgroup that has processes in it hands none on."""
    handed_on = (delegated / "cgroup.controllers").read_text().split()
    assert prepared_in(delegated, handed_on) == f"{delegated / 'flowmesh-probe'} []"
