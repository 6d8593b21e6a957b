"""P3: a full disk. Each fault of the matrix that needs a small disk, once, with the matrix's checks."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable

import pytest

from tests.faults.faults import FAULTS, Fault
from tests.faults.rig import Rig
from tests.kit.support import Node, RedisServer

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root"),
]


@pytest.mark.parametrize("fault", [each for each in FAULTS if each.disk], ids=lambda fault: fault.name)
def test_p3_a_full_disk_costs_no_node_and_no_task_its_end(fault: Fault) -> None:
    with Rig(disk=fault.disk) as rig:
        rig.begin()
        fault.act(rig, random.Random(1))
        rig.check()
        rig.settle()


@pytest.mark.parametrize("journal_only", [False, True])
def test_a_state_folder_that_cannot_be_used_is_one_line(
    redis_server: RedisServer, make_node: Callable[..., Node], journal_only: bool
) -> None:
    node = make_node(start=False, config="[results]\nmin_free_bytes = 0\n")
    node.state_dir.mkdir(mode=0o700)
    if not journal_only:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(node.state_dir)], check=True)
    try:
        node.start()
        assert node.stop() == 0
        if journal_only:
            (node.state_dir / "journal.sqlite").write_bytes(b"not a database" * 1000)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(node.state_dir)], check=True)
        lines = len(node.text().splitlines())
        node.start(wait=False)
        assert node.process is not None
        assert node.process.wait(20) == (1 if journal_only else 75), "a service manager tries again"
        (line,) = node.text().splitlines()[lines:]
        assert str(node.state_dir) in line
        assert ("move the file away" if journal_only else "read-only file system") in line
    finally:
        if not journal_only:
            subprocess.run(["umount", "-l", str(node.state_dir)], check=True)
