"""What a killed test process leaves running is ended: a node would outlive it by days."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.files.removal import remove_path
from tests.kit.paths import ROOT
from tests.kit.support import alive, until

pytestmark = pytest.mark.redis

HOLDER = """
import sys, time
from tests.kit.node_zygote import Forked
from tests.kit.support import Node, RedisServer
server = RedisServer()
executed = Node(server, worker_id="w1").start(wait=False)
forked = Node(server, worker_id="w2").start()
assert isinstance(forked.process, Forked)
executed.wait_status("IDLE")
print(server.process.pid, executed.pid, forked.pid, *executed.servers(), *forked.servers(), flush=True)
print(server.folder, executed.home, forked.home, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A test process that has started a Redis and nodes."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_nothing_runs_on_after_a_test_process_was_killed(holder: subprocess.Popen[str]) -> None:
    assert holder.stdout is not None
    pids = [int(word) for word in holder.stdout.readline().split()]
    folders = holder.stdout.readline().split()
    assert len(pids) >= 5
    assert all(map(alive, pids))
    holder.send_signal(signal.SIGKILL)
    until(lambda: not any(map(alive, pids)), "they have ended")
    for folder in folders:
        remove_path(Path(folder))
