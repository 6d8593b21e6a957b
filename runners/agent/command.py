"""One confined command: collects its output, enforces its bounds, and ends all its processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from runners.agent.usage import buffer_bytes, children, deleted_bytes, descendants, over_disk, resident_bytes
from runners.api import RunnerError

POLL_S = 0.05
DISK_EVERY_S = 1.0
READS_AT_ONCE = 16
STOP_S = 60.0
"""How long a jail may take to end, which includes copying its folder back."""
REPORT_BYTES = 1 << 16
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
    """Which bound it exceeded, or why its files are not kept; empty if neither."""
    left: tuple[str, ...] = ()
    """Paths of its folder that are not kept: neither file, folder nor link, or nested too deep."""


class NotConfined(RunnerError):
    """No kind of confinement works on this system."""


class Command:
    """One running command."""

    def __init__(
        self, process: subprocess.Popen[bytes], report: int, folder: Path, bounds: Bounds, limit_s: float,
        *, counts_disk: bool, own_network: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            process: the jail that runs it.
            report: descriptor with the jail's report, once it has ended.
            counts_disk: the folder has no file system of its own that bounds it.
            own_network: the jail has a network of its own.
        """
        self._process = process
        self._report = report
        self._folder = folder
        self._bounds = bounds
        self._limit_s = limit_s
        self._counts_disk = counts_disk
        self._own_network = own_network
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
        report = self._reported()
        if "refused" in report and not stopped:
            raise NotConfined(f"the command was not run: jail: {report['refused']}")
        if self._counts_disk and not stopped:
            stopped = over_disk(self._folder, self._bounds.disk_bytes)
        if lost := report.get("lost"):
            stopped = stopped or f"its files could not be kept: {lost}"
        left = tuple(os.fsencode(name).decode(errors="replace") for name in report.get("left", ()))
        return Ended(code=code if code >= 0 else 128 - code, output=self._kept.text(), stopped=stopped, left=left)

    def _reported(self) -> dict[str, Any]:
        """Empty if the jail was killed before it could report."""
        data = os.read(self._report, REPORT_BYTES)
        return dict(json.loads(data)) if data else {}

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
        bounds = self._bounds
        pids = list(itertools.islice(descendants(self._process.pid), bounds.processes + 2))
        if len(pids) > bounds.processes + 1:  # includes the jail's own; not all of a fork bomb is counted
            return f"it ran more than {bounds.processes} processes"
        used = sum(map(resident_bytes, pids))
        used += buffer_bytes(pids, bounds.memory_bytes - used, own_network=self._own_network)
        if used > bounds.memory_bytes:
            return f"it used more than {bounds.memory_bytes} bytes of memory"
        if self._counts_disk and time.monotonic() - self._disk_measured > DISK_EVERY_S:
            self._disk_measured = time.monotonic()
            return over_disk(self._folder, bounds.disk_bytes, deleted_bytes(pids, self._folder))
        return ""


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
    # The namespace's init, else the command; done here because the jail may be starved of CPU.
    for pid in children(process.pid):
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


def end_all() -> None:
    """Kill commands that still run, before the runner exits."""
    with _lock:
        pids = list(_running)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
