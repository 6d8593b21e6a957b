"""One confined command from its start to its end: its output kept, its bounds watched, all of it ended."""

from __future__ import annotations

import contextlib
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
MEASURE_EVERY_S = 0.2
DISK_EVERY_S = 1.0
STOP_S = 2.0
KEPT_BYTES = 32 * 1024


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What one command may use."""

    timeout_s: float = 60.0
    memory_bytes: int = 2 * 2**30
    """Of all its processes together."""
    processes: int = 64
    disk_bytes: int = 2 * 2**30
    """Of the folder."""
    network: bool = False


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended."""

    code: int
    """As a shell has it: 128 and the signal's number where one ended it."""
    output: str
    """stdout and stderr as they came; of much, the beginning and the end."""
    stopped: str = ""
    """Which bound it broke; empty: none."""


class NotConfined(RunnerError):
    """This system offers nothing that keeps a command in its folder."""


class Command:
    """One running command."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, bounds: Bounds, limit_s: float) -> None:
        """
        Args:
            process: the jail around it.
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
        measured = began
        with selectors.DefaultSelector() as selector, _pidfd(self._process.pid) as end:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(end, selectors.EVENT_READ)
            at_end = False
            while self._process.poll() is None:
                check()
                selector.select(POLL_S)
                if not at_end and self._drain(pipe):  # closed by a command that goes on without it
                    at_end = True
                    selector.unregister(pipe)
                now = time.monotonic()
                if now - began > self._limit_s:
                    stopped = f"it ran for more than {self._limit_s:g} s"
                elif now - measured > MEASURE_EVERY_S:
                    measured = now
                    stopped = self._over()
                if stopped:
                    stop(self._process)
        self._drain(pipe)
        code = self._process.returncode
        if code == EXIT_NOT_CONFINED and not stopped and self._kept.text().startswith("jail: "):
            raise NotConfined(f"the command was not run: {self._kept.text().strip()}")
        return Ended(code=code if code >= 0 else 128 - code, output=self._kept.text(), stopped=stopped)

    def _drain(self, pipe: int) -> bool:
        """Take what there is; whether the pipe is at its end."""
        while True:
            try:
                data = os.read(pipe, 1 << 16)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._kept.add(data)

    def _over(self) -> str:
        rss_bytes, count = 0, 0
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return ""
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                rss_bytes += each.memory_info().rss
                count += 1
        if rss_bytes > self._bounds.memory_bytes:
            return f"it used more than {self._bounds.memory_bytes} bytes of memory"
        if count > self._bounds.processes + 1:  # with the jail's own
            return f"it had more than {self._bounds.processes} processes"
        if time.monotonic() - self._disk_measured > DISK_EVERY_S:
            self._disk_measured = time.monotonic()
            if folder_bytes(self._folder) > self._bounds.disk_bytes:
                return f"it filled its folder with more than {self._bounds.disk_bytes} bytes"
        return ""


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


class Kept:
    """The beginning and the end of what may be much output."""

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
    """End a jail and all in it. Its namespace, else itself, ends the rest; orphans that got away are swept here."""
    known = _family(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for each in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()  # psutil compares the start time: a number used again is another process
    with _lock:
        _running.discard(process.pid)


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118 - called often
    return total


def end_all() -> None:
    """Kill what still runs. For a runner that is about to leave."""
    with _lock:
        pids = list(_running)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
