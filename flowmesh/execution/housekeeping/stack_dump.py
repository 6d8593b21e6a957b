"""The stacks of every process of a hung task, written to its logs/stacks.txt.

For each process there is the kernel's view. Python processes add their stacks by faulthandler: the node's children and
their forks on SIGUSR1. Interpreters that something else started (vLLM's engine, a data loader) have no such handler,
but PYTHONFAULTHANDLER from `environ.for_task`: they print their stacks when they abort, so they are asked last, when
the task is to be stopped anyway.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from flowmesh.processes import proc_files, tree
from flowmesh.results.safe_files import write_in

FILE = "stacks.txt"
MOST_PROCESSES = 256
"""A fork bomb's first processes are enough."""
MOST_BYTES = 64 * 1024
"""Of what one process prints."""
ANSWER_S = 0.3
ALL_ANSWERS_S = 5.0
_POLL_S = 0.005


class StackDump:
    """The stacks of one task."""

    def __init__(self, pid: int, out_dir: Path) -> None:
        """
        Args:
            pid: the task's first process.
        """
        self._first = pid
        self._out_dir = out_dir
        self._parts: list[str] = []
        self._silent: list[int] = []

    def save(self) -> None:
        """Of all processes; none of them is ended."""
        deadline = time.monotonic() + ALL_ANSWERS_S
        pids = (self._first, *tree.descendants(self._first))
        for pid in pids[:MOST_PROCESSES]:
            asked = _catches(pid, signal.SIGUSR1)  # without a handler it would end the process
            told = _answer(pid, (signal.SIGUSR1,), deadline) if asked else ""
            if not told:
                self._silent.append(pid)
            self._parts.append(_describe(pid) + told)
        if len(pids) > MOST_PROCESSES:
            self._parts.append(f"and {len(pids) - MOST_PROCESSES} more processes\n")
        self._write()

    def save_last_words(self) -> None:
        """Abort the processes that printed nothing so far; not the first one, whose end is the task's."""
        deadline = time.monotonic() + ALL_ANSWERS_S
        for pid in self._silent:
            signals: tuple[int, ...] = (signal.SIGCONT,)  # a stopped process has SIGUSR1 still pending
            if pid != self._first and _catches(pid, signal.SIGABRT):
                signals = (signal.SIGABRT, signal.SIGCONT)
            if told := _answer(pid, signals, deadline):
                self._parts.append(f"pid {pid}, when it was aborted:\n{told}")
        self._write()

    def _write(self) -> None:
        logs = self._out_dir / "logs"
        try:
            write_in(logs, FILE, "\n".join(self._parts).encode())
        except OSError as error:
            logger.bind(path=str(logs / FILE)).warning("the stacks of a hung task could not be saved: {}", error)


def _answer(pid: int, signals: tuple[int, ...], deadline: float) -> str:
    """What a process appends to its stderr file after these signals; empty if stderr is no file."""
    log = _open_log(pid)
    before = 0 if log is None else os.fstat(log).st_size
    for number in signals:
        tree.send(pid, number)
    if log is None:
        return ""
    try:
        _wait_grown(log, before, min(time.monotonic() + ANSWER_S, deadline))
        said = os.pread(log, MOST_BYTES, before).decode(errors="replace")
    finally:
        os.close(log)
    return said if not said or said.endswith("\n") else said + "\n"


def _open_log(pid: int) -> int | None:
    path = Path(f"/proc/{pid}/fd/2")
    try:
        if path.is_file():
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # gone, closed, or not ours to read
        pass
    return None


def _wait_grown(log: int, before: int, end: float) -> None:
    """Wait until the file has grown and grows no more."""
    seen = before
    while time.monotonic() < end:
        time.sleep(_POLL_S)
        size = os.fstat(log).st_size
        if size == seen != before:
            return
        seen = size


def _describe(pid: int) -> str:
    command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()[:500]
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        return f"pid {pid}: gone\n"
    lines = [f"pid {pid}: {command}", *(line for tid in threads for line in _thread(pid, tid))]
    return "\n".join(lines) + "\n"


def _thread(pid: int, tid: str) -> Iterator[str]:
    folder = f"/proc/{pid}/task/{tid}"
    state = _field(_read(f"{folder}/status"), "State:") or "?"
    yield f"  thread {tid} {_read(f'{folder}/comm').strip()}: {state}, waits in {_read(f'{folder}/wchan') or '?'}"
    for line in _read(f"{folder}/stack").splitlines():
        yield f"    {line}"


def _catches(pid: int, number: int) -> bool:
    caught = _field(_read(f"/proc/{pid}/status"), "SigCgt:")
    return caught is not None and bool(int(caught, 16) >> (number - 1) & 1)


def _field(status: str, name: str) -> str | None:
    return next((line.removeprefix(name).strip() for line in status.splitlines() if line.startswith(name)), None)


def _read(path: str) -> str:
    try:
        return proc_files.read_small(path).decode(errors="replace")
    except OSError:
        return ""
