"""Runs the commands of agents in the task's folder: confined, with bounds on time, memory, processes and output.

The confinement is `jail/`'s. Where a system allows none of it, commands are refused: they could read what the node's
user can read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from runners.api import RunnerError

JAIL = Path(__file__).with_name("jail") / "main.py"
EXIT_NOT_CONFINED = 97
MODES = ("namespaces", "landlock")
Mode = Literal["namespaces", "landlock"]

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = (
    "alternatives", "ca-certificates", "ca-certificates.conf", "crypto-policies", "group", "hosts", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf", "passwd", "pki", "protocols",
    "resolv.conf", "services", "ssl",
)  # fmt: skip
PASSED = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "FLOWMESH_ATTEMPT")
POLL_S = 0.05
MEASURE_EVERY_S = 0.2
STOP_S = 2.0
KEPT_BYTES = 32 * 1024
FILE_BYTES = 512 * 2**20
OPEN_FILES = 1024


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


class Sandbox:
    """One folder and the commands that run in it."""

    def __init__(self, folder: Path, bounds: Bounds, *, mode: Mode | None = None) -> None:
        """
        Args:
            mode: which kind of jail; None: the best that this system has.

        Raises:
            NotConfined: it has none.
        """
        self.folder = folder.resolve()
        self.bounds = bounds
        self.mode = mode or best_mode()
        (self.folder / ".tmp").mkdir(parents=True, exist_ok=True)

    def describe(self) -> dict[str, str]:
        """For the result: what the confinement rests on here."""
        if self.bounds.network:
            network = "on"
        else:
            network = "off (network namespace)" if self.mode == "namespaces" else "off (no sockets)"
        processes = "own (pid namespace)" if self.mode == "namespaces" else "the node's (its user's can be signalled)"
        if self.mode == "landlock" and signals_confined():
            processes = "the node's (signals confined)"
        return {"files": self.mode, "network": network, "processes": processes}

    def run(self, command: Sequence[str], check: Callable[[], None], *, timeout_s: float | None = None) -> Ended:
        """Run `command` in the folder.

        Args:
            check: asked many times a second; what it raises ends the command, and is raised again.
            timeout_s: where it is less than the bound's.

        Raises:
            NotConfined: the jail could not be built after all.
        """
        limit_s = min(timeout_s or self.bounds.timeout_s, self.bounds.timeout_s)
        with tempfile.TemporaryDirectory(prefix="jail-") as root:
            process = self._start(command, root, limit_s)
            with _lock:
                _running.add(process.pid)
            try:
                return _Watch(process, self, limit_s).until_end(check)
            finally:
                _stop(process)

    def _start(self, command: Sequence[str], root: str, limit_s: float) -> subprocess.Popen[bytes]:
        plan = {
            "mode": self.mode,
            "network": self.bounds.network,
            "root": root,
            "work_dir": str(self.folder),
            "readable": readable_paths(),
            "env": environment(self.folder),
            "limits": {
                "RLIMIT_CORE": 0,
                "RLIMIT_DATA": self.bounds.memory_bytes,
                "RLIMIT_FSIZE": min(FILE_BYTES, self.bounds.disk_bytes),
                "RLIMIT_NOFILE": OPEN_FILES,
                "RLIMIT_CPU": int(limit_s * 64) + 60,
            },
        }
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL), json.dumps(plan), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            cwd="/",
        )


class _Watch:
    """One running command."""

    def __init__(self, process: subprocess.Popen[bytes], sandbox: Sandbox, limit_s: float) -> None:
        self._process = process
        self._folder = sandbox.folder
        self._bounds = sandbox.bounds
        self._limit_s = limit_s
        self._kept = Kept(KEPT_BYTES)

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
                    _stop(self._process)
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


def _stop(process: subprocess.Popen[bytes]) -> None:
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
    if process.stdout is not None:
        process.stdout.close()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def readable_paths() -> list[str]:
    """The programs and libraries of this machine, and this Python's."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.base_prefix)}
    paths = [*SYSTEM, *(f"/etc/{name}" for name in ETC), *sorted(own - {"/", "/usr"})]
    return [path for path in paths if os.path.lexists(path)]


def environment(folder: Path) -> dict[str, str]:
    """A command's whole environment; nothing of the node's own is in it."""
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    python = str(Path(sys.executable).parent)
    return {
        "LANG": "C.UTF-8",
        **passed,
        "PATH": f"{python}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),
        "PWD": str(folder),
        "TMPDIR": str(folder / ".tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def signals_confined() -> bool:
    """Whether this kernel's Landlock keeps a command from signalling processes that are not its own."""
    from runners.agent.jail.kernel import landlock_version

    return landlock_version() >= 6


def folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118 - called often
    return total


@functools.cache
def mode_works(mode: Mode) -> str:
    """Empty where a jail of this kind can be built here, else why not."""
    with tempfile.TemporaryDirectory(prefix="jail-probe-") as folder:
        try:
            ended = Sandbox(Path(folder), Bounds(timeout_s=20), mode=mode).run(["true"], lambda: None)
        except NotConfined as error:
            return str(error)
    return "" if ended.code == 0 else ended.stopped or f"the probe ended with {ended.code}: {ended.output.strip()}"


def best_mode() -> Mode:
    """The best kind of jail that this system has.

    Raises:
        NotConfined: none works.
    """
    reasons = []
    for mode in MODES:
        if not (reason := mode_works(mode)):
            return mode
        reasons.append(f"{mode}: {reason}")
    raise NotConfined(
        "agents cannot run code on this node, nothing here would keep it in its folder "
        f"({'; '.join(reasons)}); allow user namespaces or Landlock, or leave the tools python and shell out"
    )


def end_all() -> None:
    """Kill what still runs. For a runner that is about to leave."""
    with _lock:
        pids: list[Any] = list(_running)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
