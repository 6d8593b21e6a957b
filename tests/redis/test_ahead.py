"""The next task of a slot is prepared while another one runs there."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.client import Client
from flowmesh.execution.launch.ahead import FIRST_ATTEMPT
from tests.kit.file_server import Served, Server
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis
SIZE = 24 << 20
CONFIG = """
[tasks]
local_hosts = ["*"]

[environments.light]
preload = ["requests", "tests.kit.ahead_runners", "runners.ahead"]

[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"

[task_types.reading]
runner = "tests.kit.ahead_runners:ReadingRunner"
environment = "light"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with contextlib.closing(RedisServer()) as made:
        yield made


@pytest.fixture(scope="module")
def node(server: RedisServer) -> Iterator[Node]:
    with contextlib.closing(Node(server, config=CONFIG)) as made:
        yield made.start()


@pytest.fixture
def peer(server: RedisServer) -> Iterator[Orchestrator]:
    with contextlib.closing(Orchestrator(server)) as made:
        yield made


@pytest.fixture
def files() -> Iterator[Server]:
    with Server() as made:
        made.files["data"] = Served(b"download" * 1000)
        yield made


class Busy:
    """A task that has the slot until it is let go."""

    def __init__(self, node: Node, peer: Orchestrator) -> None:
        self._node, self._peer = node, peer
        self._task = peer.dispatch("w1", {"taskType": "misbehave", "do": "wait_for", "file": "go"})
        until(lambda: node.task_pid(self._task), "it runs")
        self._go = node.results_dir / self._task / "go"

    def let_go(self) -> None:
        self._go.touch()
        assert self._peer.wait_end(self._task)["type"] == "TASK_SUCCEEDED"

    def close(self) -> None:
        self._go.touch()
        self._node.wait_status("IDLE")


@pytest.fixture
def busy(node: Node, peer: Orchestrator) -> Iterator[Busy]:
    """On the module's node, which is idle again after a test that failed, too."""
    with contextlib.closing(Busy(node, peer)) as made:
        yield made


def cold_file(path: Path) -> Path:
    """A file of which nothing is in the kernel's cache."""
    with path.open("wb") as file:
        file.write(b"01234567" * (SIZE // 8))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path) > SIZE // 10:
        pytest.skip(f"files in {path.parent} stay in memory")
    return path


def cached(path: Path) -> int:
    """Bytes of a file that are in the kernel's cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as at:
        pages = (len(at) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(at))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(at)), found) == 0
        return sum(page & 1 for page in found) * mmap.PAGESIZE


def prepares(node: Node) -> bool:
    """Whether something is prepared now: it has a folder, which no task of that number has."""
    return any(int(name) >= FIRST_ATTEMPT for name in os.listdir(node.state_dir / "tmp"))


def asked(files: Server) -> list[int]:
    return [status for _, _, status in files.requests]


def test_what_a_waiting_task_will_read_is_there_when_it_starts(
    node: Node, peer: Orchestrator, files: Server, busy: Busy, tmp_path: Path
) -> None:
    path = cold_file(tmp_path / "weights")
    task = peer.dispatch("w1", {"taskType": "reading", "paths": [str(path)], "urls": [files.url("data")]})
    until(lambda: cached(path) == SIZE, "it is read")
    until(lambda: asked(files) == [200], "it is downloaded")
    until(lambda: not prepares(node), "nothing is left to do")
    busy.let_go()
    end = peer.wait_end(task)
    assert node.result(task)["begins"] == ["01234567", "download"]
    assert asked(files) == [200, 304], "the task asks once more whether that is still the file"
    prepared = end["payload"]["resources"]["prepared"]
    assert prepared["read_bytes"] == SIZE + 8000
    assert prepared["cpu_seconds"] > 0


def test_a_task_that_gets_its_slot_does_not_wait_for_what_is_prepared(
    node: Node, peer: Orchestrator, files: Server, busy: Busy
) -> None:
    files.files["data"] = Served(b"download" * 1000, statuses=[503, 503, 503])
    task = peer.dispatch("w1", {"taskType": "reading", "urls": [files.url("data")]})
    until(lambda: len(files.requests) > 0, "the download has begun")
    busy.let_go()
    assert peer.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.result(task)["begins"] == ["download"]
    until(lambda: not prepares(node), "its helper has ended")


@pytest.mark.parametrize("spec", [{"paths": ["/no/such/file"]}, {"refuses": True, "paths": ["/no/such/file"]}])
def test_what_cannot_be_prepared_is_the_tasks_own_error(
    node: Node, peer: Orchestrator, busy: Busy, spec: dict[str, Any]
) -> None:
    (log := node.state_dir / "log" / "ahead-main.log").unlink(missing_ok=True)
    task = peer.dispatch("w1", {"taskType": "reading", **spec})
    until(lambda: log.exists() and log.stat().st_size, "it was tried")
    busy.let_go()
    end = peer.wait_end(task)
    assert end["type"] == "TASK_FAILED"
    assert "/no/such/file" in end["error"]
    node.wait_status("IDLE")


def test_a_node_that_prepares_nothing_runs_as_ever(make_node, orchestrator: Orchestrator, tmp_path: Path) -> None:
    node: Node = make_node("--set", "tasks.prepare_next=false", config=CONFIG)
    path = cold_file(tmp_path / "weights")
    busy = Busy(node, orchestrator)
    task = orchestrator.dispatch("w1", {"taskType": "reading", "paths": [str(path)]})
    time.sleep(2.5)  # more than it takes otherwise
    assert cached(path) < SIZE
    busy.let_go()
    assert "prepared" not in orchestrator.wait_end(task)["payload"]["resources"]


def test_of_the_queues_next_task_only_what_is_here_is_read(
    node: Node, peer: Orchestrator, files: Server, busy: Busy, tmp_path: Path
) -> None:
    path = cold_file(tmp_path / "weights")
    with Client(node.server.url) as client:
        spec = {"taskType": "reading", "paths": [str(path)], "urls": [files.url("data")]}
        later = client.queue(
            {"spec": {"taskType": "reading", "paths": [], "name": "behind it"}}, priority="low"
        ).task_id
        task = client.queue({"spec": spec}).task_id
        until(lambda: cached(path) == SIZE, "it is read")
        until(lambda: not prepares(node), "nothing is left to do")
        state = client.state(task)
        assert state is not None
        assert (state.state, state.attempt) == ("queued", 0), "any node can still take it"
        assert asked(files) == [], "nothing is downloaded by a node that may not get the task"
        busy.let_go()
        assert client.wait(task).ok
        assert client.wait(later).ok
    assert asked(files) == [200]
    (end,) = peer.ends(task) or [peer.wait_end(task)]
    assert end["payload"]["resources"]["prepared"]["read_bytes"] == SIZE
