"""The process that loads and serves the model, as its parent sees it, and what it is given."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.messages.job import Fault, Job, Outcome
from flowmesh.messages.text import encode_json
from flowmesh.processes import linux
from flowmesh.processes.pipe import Cancel, Frame, FrameError, Pipe
from runners import child
from runners.api import Context

RUNNER = "runners.serve.runner:ServingRunner"
REPORT = "serving.json"
END_S = 10.0
"""How long processes that were killed may take to be gone."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What stays the same over restarts, and what was counted before this one."""

    listener: socket.socket
    key: str
    since: float | None = None
    """When the model was first served, monotonic; None: not yet."""
    numbers: dict[str, float] = {}
    times: dict[str, tuple[float, ...]] = {}


class ServingContext(Context):
    """The context of the serving process, whose frames go to its parent."""

    def __init__(self, job: Job, pipe: Pipe, place: Place, turn: socket.socket) -> None:
        super().__init__(job, pipe)
        self.place = place
        self._turn = turn

    def take_listener(self) -> None:
        """Wait until the parent answers no more connections itself."""
        self._turn.send(b"?")
        self._turn.recv(1)


class Process:
    """A running serving process."""

    def __init__(self, pid: int, pipe: Pipe, turn: socket.socket, report: Path) -> None:
        self.pid = pid
        self.handle = os.pidfd_open(pid)
        self.pipe = pipe
        self.turn = turn
        self._report = report
        self._readable = True

    def waits_for(self) -> list[int]:
        return [self.handle, self.turn.fileno(), *([self.pipe.fileno()] if self._readable else [])]

    def frames(self) -> Iterator[Frame]:
        """Those that wait."""
        while self._readable:
            try:
                frame = self.pipe.poll()
            except EOFError:
                self._readable = False
                return
            except FrameError:
                continue
            if frame is None:
                return
            yield frame

    def send(self, frame: Cancel) -> None:
        self.pipe.send(frame, drop=True)

    def wants_listener(self) -> bool:
        """Whether it waits for the listener; `give_listener` lets it go on."""
        with contextlib.suppress(BlockingIOError, OSError):
            return self.turn.recv(1, socket.MSG_DONTWAIT) == b"?"
        return False

    def give_listener(self) -> None:
        with contextlib.suppress(OSError):
            self.turn.send(b"!")

    def outcome(self) -> Outcome | None:
        """How it ended; None: it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        try:
            return msgspec.json.decode(self._report.read_bytes(), type=Outcome)
        except (OSError, msgspec.DecodeError):
            return Outcome(attempt=0, ok=False, fault=Fault.CRASH, message=_words(os.waitstatus_to_exitcode(status)))

    def close(self) -> None:
        os.close(self.handle)
        self.pipe.close()
        self.turn.close()


def fork(ctx: Context, place: Place) -> Process:
    """Start it. Only in a process with one thread that has not used a GPU."""
    report = ctx.tmp_dir / REPORT
    report.unlink(missing_ok=True)
    near, far = Pipe.pair()
    turn, other = socket.socketpair()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        far.close()
        other.close()
        return Process(pid, near, turn, report)
    try:
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            near.close()
            turn.close()
            if ctx.pipe is not None:
                ctx.pipe.close()
            _run(ServingContext(msgspec.structs.replace(ctx.job, runner=RUNNER), far, place, other), report)
    finally:
        os._exit(70)


def _run(ctx: ServingContext, report: Path) -> NoReturn:
    outcome = child.run(ctx.job, ctx)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    partial = report.with_suffix(".partial")
    partial.write_bytes(encode_json(outcome))
    partial.rename(report)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0 if outcome.ok else 1)


def end_all() -> bool:
    """Kill what is left below this process, which is the subreaper of its children; returns whether all is gone."""
    deadline = time.monotonic() + END_S
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _words(status: int) -> str:
    if status < 0:
        return f"the serving process was killed by {signal.Signals(-status).name}"
    return f"the serving process ended with exit status {status} and no result"
