"""What a fork server does once it serves, in quiet moments, so that each task starts and ends sooner.

It puts its memory into large pages. Then it sends a scout ahead: a child that does what tasks do, and tells which
of the shared pages it wrote to. Whatever of it fails, tasks run as they would without.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flowmesh.processes import linux, pages
from flowmesh.processes.pages import Span
from flowmesh.processes.preload import named

SCOUT = "flowmesh-scout"
SCOUT_TIMEOUT_S = 60
SCOUT_NICE = 10
MAX_ANSWER_BYTES = 16 << 20


def folder_of(server: Path) -> Path:
    """Where the scout of the server with this socket works; it is gone when it is back."""
    return server.with_suffix(".scout")


class Warmup:
    def __init__(self, scout: str | None, folder: Path) -> None:
        """
        Args:
            scout: `module:function` that does in a folder of its own what tasks do.
            folder: that folder; it is made, and removed.
        """
        self.written: tuple[Span, ...] = ()
        """Pages that a task will write to, once the scout has told."""
        self._work = scout
        self._folder = folder
        self._large: Iterator[bool] | None = pages.into_large()
        self._pid: int | None = None
        self._answer = -1

    @property
    def waits(self) -> bool:
        """Whether there is something to do in a quiet moment."""
        return self._large is not None or self._work is not None

    @property
    def over(self) -> bool:
        """Whether a child that is forked now has all that is to be had."""
        return not self.waits and self._pid is None

    @property
    def pids(self) -> set[int]:
        return set() if self._pid is None else {self._pid}

    def step(self) -> bool:
        """Do what takes milliseconds; returns whether there is more of it."""
        if self._large is not None:
            if not next(self._large, False):
                self._large = None
        elif self._work is not None:
            target, self._work = self._work, None
            self._send(target)
        return self.waits

    def reaped(self, pid: int, status: int) -> None:
        """A child of the server's has ended, perhaps the scout."""
        if pid != self._pid:
            return
        if status == 0:
            self.written = _read(self._answer)
        self._pid = None
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def drop(self) -> None:
        """End it; nothing more is done."""
        self._large = self._work = None
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self.reaped(*os.waitpid(self._pid, 0))

    def close(self) -> None:
        """Let go of its descriptor, also in a child that has inherited it."""
        if self._answer >= 0:
            os.close(self._answer)
            self._answer = -1

    def _send(self, target: str) -> None:
        try:
            self._folder.mkdir(mode=0o700)
            self._answer = os.memfd_create("scout")
            me = os.getpid()
            self._pid = os.fork() or None
        except OSError as error:
            sys.stderr.write(f"no scout: {error}\n")
            self.close()
            return
        if self._pid is None:
            _scout(target, self._folder, self._answer, me)


def _scout(target: str, folder: Path, answer: int, parent: int) -> None:
    """In the child: do it, tell, and never come back."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            return
        linux.set_name(SCOUT)
        signal.alarm(SCOUT_TIMEOUT_S)
        os.nice(SCOUT_NICE)
        writes = pages.Writes()
        named(target)(folder)
        with open(answer, "wb") as file:
            file.write(msgspec.msgpack.encode(writes.so_far()))
        status = 0
    except Exception:  # noqa: BLE001 - whatever a library raises: told in this server's log, and no task's concern
        sys.stderr.write(f"the scout ({target}) failed; tasks start a little later without it\n")
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _read(answer: int) -> tuple[Span, ...]:
    try:
        return msgspec.msgpack.decode(os.pread(answer, MAX_ANSWER_BYTES, 0), type=tuple[Span, ...])
    except msgspec.DecodeError:
        return ()
