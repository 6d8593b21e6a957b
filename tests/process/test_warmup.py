"""What a fork server does beforehand with the memory that its children will share."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from flowmesh.processes import pages
from flowmesh.processes.ahead import MANY
from flowmesh.processes.child import Start, make_own
from flowmesh.processes.forkserver import ORPHAN_EXIT, Options
from flowmesh.processes.limits import Limits
from flowmesh.processes.pages import Span, Writes
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import Fork, encode
from flowmesh.processes.warmup import Warmup
from tests.support import alive, short_dir, spares, until

PAGE = mmap.PAGESIZE
COUNT = 64
HERE = "tests.process.test_warmup"

block = mmap.mmap(-1, COUNT * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
"""Memory that a test's process shares with its forks once it has written to it."""


block[:] = b"x" * len(block)


def first_page() -> int:
    """The number of the block's first page."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block)) // PAGE


def in_block(spans: tuple[Span, ...] | list[Span]) -> set[int]:
    """Which of the block's pages are in these spans."""
    own = {first + each for first, count in spans for each in range(count)}
    start = first_page()
    return {page - start for page in own if start <= page < start + COUNT}


def in_a_fork(work: Callable[[], object]) -> None:
    """Have `work` done in a child of this process; an assertion that fails there fails here."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:  # noqa: BLE001 - told by the exit status; the text is for who reads the output
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_sees_which_shared_pages_it_writes_to() -> None:
    def work() -> None:
        writes = Writes()
        assert in_block(writes.so_far()) == set()
        for page in (3, 4, 9):
            block[page * PAGE] = 1
        assert in_block(writes.so_far()) == {3, 4, 9}
        assert (first_page() + 3, 2) in writes.so_far(), "neighbours are one span"

    in_a_fork(work)


def test_pages_are_made_its_own_with_what_is_in_them() -> None:
    def work() -> None:
        writes = Writes()
        pages.make_own((first_page() + 12, 2))
        assert in_block(writes.so_far()) == {12, 13}
        assert block[:] == b"x" * len(block)

    in_a_fork(work)


def test_a_span_that_is_not_there_does_no_harm() -> None:
    in_a_fork(lambda: pages.make_own((1, 3)))


def start(orders: socket.socket, spans: tuple[Span, ...]) -> Start:
    near, _far = Pipe.pair()
    return Start(orders, near, None, os.getppid(), None, spans)


def test_a_child_that_waits_has_copies_of_what_its_task_will_write_to() -> None:
    def work() -> None:
        _near, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        writes = Writes()
        make_own(start(orders, ((first_page() + 7, 1),)))
        assert in_block(writes.so_far()) == {7}

    in_a_fork(work)


def test_a_task_that_has_come_does_not_wait_for_that() -> None:
    def work() -> None:
        near, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.send(b"a task")
        writes = Writes()
        make_own(start(orders, ((first_page() + 7, 1),)))
        assert in_block(writes.so_far()) == set()

    in_a_fork(work)


# ---- the scout -------------------------------------------------------------------------------------------------------


def writes_to_the_block(folder: Path) -> None:
    (folder / "a file").write_text("left behind")
    block[5 * PAGE] = 1


def fails(folder: Path) -> None:
    raise RuntimeError(f"nothing works in {folder.name}")


def hangs(folder: Path) -> None:
    signal.alarm(0)
    time.sleep(600)


@contextlib.contextmanager
def sent(target: str, tmp_path: Path) -> Iterator[Warmup]:
    """A warm-up whose scout is out."""
    warmup = Warmup(f"{HERE}:{target}", tmp_path / "scout")
    while warmup.step():
        pass
    assert warmup.pids
    assert not warmup.over
    yield warmup
    assert list(tmp_path.iterdir()) == []
    assert not warmup.pids


def come_back(warmup: Warmup) -> None:
    (pid,) = warmup.pids
    handle = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    assert poller.poll(20_000)
    os.close(handle)
    warmup.reaped(*os.waitpid(pid, 0))


def test_the_scout_tells_what_it_wrote_to(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with sent("writes_to_the_block", tmp_path) as warmup:
        come_back(warmup)
        assert warmup.over
    assert in_block(warmup.written) == {5}
    assert block[5 * PAGE] == ord("x"), "it wrote in its own copy"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_scout_that_fails_is_told_and_missed_by_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with sent("fails", tmp_path) as warmup:
        come_back(warmup)
        assert warmup.over
    assert warmup.written == ()
    told = capfd.readouterr().err
    assert f"the scout ({HERE}:fails) failed; tasks start a little later without it" in told
    assert "RuntimeError: nothing works in scout" in told


def test_a_server_that_ends_does_not_wait_for_its_scout(tmp_path: Path) -> None:
    with sent("hangs", tmp_path) as warmup:
        (pid,) = warmup.pids
        warmup.drop()
        assert warmup.over
    assert not alive(pid)


def test_a_folder_in_its_way_means_no_scout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scout").mkdir()
    warmup = Warmup(f"{HERE}:fails", tmp_path / "scout")
    while warmup.step():
        pass
    assert warmup.over
    assert "no scout:" in capfd.readouterr().err


# ---- large pages -----------------------------------------------------------------------------------------------------

LARGE = """
import mmap, re
from pathlib import Path
from flowmesh.processes import pages
def large():
    return int(re.search(r"AnonHugePages: *([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1])
block = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block[:] = bytes(range(256)) * (len(block) // 256)
before = large()
steps = sum(1 for _ in pages.into_large())
assert block[:] == bytes(range(256)) * (len(block) // 256)
print(before, large(), steps)
"""


def test_memory_goes_into_large_pages_unchanged() -> None:
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 1):
        pytest.skip("this kernel is older than 6.1, which moves memory into large pages on request")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no large pages")
    said = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout
    before_kib, after_kib, steps = map(int, said.split())
    assert steps >= 31
    assert after_kib - before_kib >= 32 << 10


# ---- all of it -------------------------------------------------------------------------------------------------------


def tells_what_is_its_own(_pipe: Pipe, spool: Path) -> int:
    """A task's entry."""
    writes = pages.Writes()
    was_shared = {page for page in range(COUNT) if page != 5}
    for page in range(COUNT):
        block[page * PAGE] = 2
    (spool / "told").write_text(str(was_shared == in_block(writes.so_far())))
    (spool / "told").rename(spool / "own")
    return 0


def test_a_servers_tasks_have_what_its_scout_wrote_to() -> None:
    folder = short_dir()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as listener:
        listener.bind(str(folder / "s.sock"))
        listener.listen()
        options = Options(
            socket=str(folder / "s.sock"),
            fd=listener.fileno(),
            preload=(HERE,),
            scout=f"{HERE}:writes_to_the_block",
            adoption_timeout_s=1.0,
        )
        command = [sys.executable, "-m", "flowmesh.processes.forkserver", msgspec.json.encode(options).decode()]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as supervisor:
            supervisor.connect(str(folder / "s.sock"))
            until(lambda: len(spares(server.pid)) == MANY, "children are forked ahead")
            assert os.listdir(folder) == ["s.sock"], "the scout is back, and its folder is gone"
            time.sleep(0.2)  # a task that comes at once is not kept waiting for those pages
            log = str(folder / "log")
            supervisor.send(
                encode(
                    Fork(
                        attempt=1, target=f"{HERE}:tells_what_is_its_own", spool=str(folder), cwd=str(folder),
                        stdout=log, stderr=log, env=dict(os.environ), limits=Limits(),
                    )
                )
            )  # fmt: skip
            until((folder / "own").exists, "the task has run")
            assert (folder / "own").read_text() == "True"
        assert server.wait(20) == ORPHAN_EXIT
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)
