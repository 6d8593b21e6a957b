"""One confined command: collects its output, enforces its bounds, and ends all its processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil

from runners.api import RunnerError

EXIT_NOT_CONFINED = 97
POLL_S = 0.05
DISK_EVERY_S = 1.0
READS_AT_ONCE = 16
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
DEEPEST = 100
"""Nesting of folders that a command may create. Deeper ones could not be measured and packed."""
ENTRY_BYTES = 4096
"""Minimum size that a file or folder counts for: empty ones use disk space, too."""
STOP_S = 2.0
KEPT_BYTES = 32 * 1024
MOST_SWEPT = 1000


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one command."""

    timeout_s: float = 60.0
    memory_bytes: int = 2 * 2**30
    """Sum over its processes."""
    processes: int = 64
    disk_bytes: int = 2 * 2**30
    """Of the folder."""
    network: bool = False


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended."""

    code: int
    """As in a shell: 128 plus the signal's number if a signal ended it."""
    output: str
    """stdout and stderr in order; of long output the beginning and the end."""
    stopped: str = ""
    """Which bound it exceeded; empty if none."""


class NotConfined(RunnerError):
    """No kind of confinement works on this system."""


class Command:
    """One running command."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, bounds: Bounds, limit_s: float) -> None:
        """
        Args:
            process: the jail that runs it.
        """
        self._process = process
        self._folder = folder
        self._bounds = bounds
        self._limit_s = limit_s
        self._kept = Kept(KEPT_BYTES)
        self._disk_measured = time.monotonic()
        with _lock:
            _running.add(process.pid)

    def until_end(self, check: Callable[[], None]) -> Ended:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        os.set_blocking(pipe, False)
        stopped = ""
        began = time.monotonic()
        with selectors.DefaultSelector() as selector, _pidfd(self._process.pid) as end:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(end, selectors.EVENT_READ)
            at_end = False
            while self._process.poll() is None:
                check()
                selector.select(POLL_S)
                if not at_end and self._drain(pipe) is True:  # the command closed it and still runs
                    at_end = True
                    selector.unregister(pipe)
                if time.monotonic() - began > self._limit_s:
                    stopped = f"it ran for more than {self._limit_s:g} s"
                else:
                    stopped = self._over()
                if stopped:
                    stop(self._process)
        while self._drain(pipe) is None:
            check()
        code = self._process.returncode
        if code == EXIT_NOT_CONFINED and not stopped and self._kept.text().startswith("jail: "):
            raise NotConfined(f"the command was not run: {self._kept.text().strip()}")
        return Ended(code=code if code >= 0 else 128 - code, output=self._kept.text(), stopped=stopped)

    def _drain(self, pipe: int) -> bool | None:
        """Read what is available. True at end of file; None if there may be more, but the bounds are due."""
        for _ in range(READS_AT_ONCE):
            try:
                data = os.read(pipe, 1 << 16)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._kept.add(data)
        return None

    def _over(self) -> str:
        rss_bytes = 0
        for others, pid in enumerate(descendants(self._process.pid)):
            if others > self._bounds.processes:  # includes the jail's own; stop early at a fork bomb
                return f"it ran more than {self._bounds.processes} processes"
            with contextlib.suppress(OSError, IndexError):
                rss_bytes += int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * PAGE_BYTES
        if rss_bytes > self._bounds.memory_bytes:
            return f"it used more than {self._bounds.memory_bytes} bytes of memory"
        if time.monotonic() - self._disk_measured > DISK_EVERY_S:
            self._disk_measured = time.monotonic()
            return over_disk(self._folder, self._bounds.disk_bytes)
        return ""


def descendants(pid: int) -> Iterator[int]:
    """The descendants of a process, lazily: scanning all of a fork bomb takes seconds."""
    todo = [pid]
    while todo:
        for child in _below(todo.pop()):
            yield child
            todo.append(child)


def _below(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            yield from map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


class Kept:
    """Keeps the beginning and the end of long output."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        room = self._half - len(self._head)
        self._head += data[:room] if room > 0 else b""
        self._tail += data[max(room, 0) :]
        over = len(self._tail) - self._half
        if over > 0:
            del self._tail[:over]
            self._dropped += over

    def text(self) -> str:
        between = f"\n… {self._dropped} bytes left out …\n".encode() if self._dropped else b""
        return (bytes(self._head) + between + bytes(self._tail)).decode(errors="replace")


_running: set[int] = set()
_lock = threading.Lock()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a jail and all processes in it. Its namespace or the jail kills the rest; this also sweeps orphans."""
    for pid in _below(
        process.pid
    ):  # the namespace's init, else the command; done here because the jail may be starved of CPU
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    known = [each for pid in itertools.islice(descendants(process.pid), MOST_SWEPT) if (each := _process(pid))]
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for each in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()  # psutil compares start times, so a reused pid is safe
    with _lock:
        _running.discard(process.pid)


def _process(pid: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def over_disk(folder: Path, limit_bytes: int) -> str:
    """Which bound a folder exceeds; empty if none."""
    total = 0
    todo = [(os.fspath(folder), 0)]
    while todo:
        path, depth = todo.pop()
        if depth > DEEPEST:
            return f"it nested more than {DEEPEST} folders"
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += max(entry.stat(follow_symlinks=False).st_blocks * 512, ENTRY_BYTES)
                if entry.is_dir(follow_symlinks=False):
                    todo.append((entry.path, depth + 1))
                if total > limit_bytes:
                    return f"it filled its folder with more than {limit_bytes} bytes"
    return ""


def end_all() -> None:
    """Kill commands that still run, before the runner exits."""
    with _lock:
        pids = list(_running)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
