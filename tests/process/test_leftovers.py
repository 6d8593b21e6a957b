"""What earlier tasks left is removed beside the work: it delays nothing, and nothing of a new task is removed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kit.clock_shim import compiler
from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import Node, Orchestrator, until

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(compiler() is None, reason="no C compiler: a removal that takes long is made by a C library"),
]
HOLD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int unlinkat(int folder, const char *name, int flags) {
    const char *gate = getenv("TEST_GATE");
    while (strcmp(name, "held") == 0 && gate && access(gate, F_OK) != 0) usleep(10000);
    int (*real)(int, const char *, int) = dlsym(RTLD_NEXT, "unlinkat");
    return real(folder, name, flags);
}
"""


def test_a_removal_that_takes_long_holds_nothing_up(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    """The journal was moved away meanwhile, so that the new attempt has the number of the old one."""
    (tmp_path / "hold.c").write_text(HOLD)
    library, gate = tmp_path / "hold.so", tmp_path / "gate"
    subprocess.run([str(compiler()), "-shared", "-fPIC", "-o", library, tmp_path / "hold.c"], check=True)
    node: Node = make_node(config=MISBEHAVE, env={"LD_PRELOAD": str(library), "TEST_GATE": str(gate)})
    assert node.stop() == 0
    for journal in node.state_dir.glob("journal.sqlite*"):
        journal.unlink()
    parents = [node.state_dir / "tmp", node.state_dir / "spool"]
    for parent in parents:
        (parent / "1" / "inner").mkdir(parents=True)
        (parent / "1" / "inner" / "held").touch()

    def left() -> list[Path]:
        return [each for parent in parents for each in parent.glob("*/inner/held")]

    node.start()
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    assert len(left()) == 2, "registered, and at work, while they are being removed"
    gate.touch()
    until(lambda: not left(), "they are removed")
    for parent in parents:
        until(lambda parent=parent: [each.name for each in parent.iterdir()] == ["1"], "the new task's folder stays")
    assert (node.state_dir / "spool" / "1" / "job.json").exists()
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
