"""A running program: its end, what it reports, and how it is asked to stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from flowmesh.messages.job import CommandExit, Fault
from runners.api import Cancelled, Context, RunnerError
from runners.command.lines import Lines

TICK_S = 1.0
TAIL_BYTES = 16 * 1024
LAST_LINE_CHARS = 300
PASSED_ON = (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
LOST = "the terminal that called it is gone"


class Failed(RunnerError):
    """The program did not end with status 0."""

    says_all = True

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class Program:
    """
    Args:
        pid: of its first process, a child of this one that leads a session.
        caller: gives signals for it, from a terminal; None: there is none.
        logs: the folder with its output; None: that goes to the caller's terminal.
    """

    def __init__(self, ctx: Context, pid: int, lines: Lines, caller: socket.socket | None, logs: Path | None) -> None:
        self._ctx = ctx
        self._pid = pid
        self._handle = os.pidfd_open(pid)
        self._lines = lines
        self._caller = caller
        self._logs = logs
        self._written = 0
        self._stopping: Cancelled | None = None

    def until_end(self) -> None:
        """Wait for its end, and pass on what it reports.

        A request to stop becomes a SIGTERM, after which the program has the node's grace to end by itself.

        Raises:
            Cancelled: the node, or the caller's end, asked it to stop. Also if it then ended with status 0.
            Failed: it ended with another status, or by a signal.
        """
        with _terminated() as terminated:
            poller = select.poll()
            for fd in (self._handle, self._lines.fd, terminated, *self._of_node(), *self._of_caller()):
                poller.register(fd, select.POLLIN)
            while self._handle not in (ready := {fd for fd, _ in poller.poll(TICK_S * 1000)}):
                with contextlib.suppress(Cancelled):  # asked for below
                    self._lines.read(self._ctx)
                if ready.intersection(self._of_caller()) and not self._hear():
                    poller.unregister(*self._of_caller())
                    self._signal(signal.SIGHUP)
                    self._stop(Cancelled(LOST))
                if terminated in ready:
                    poller.unregister(terminated)
                    self._stop(Cancelled("terminated by the node"))
                if ready.intersection(self._of_node()):
                    if (request := self._ctx.cancelled) is not None:
                        self._stop(Cancelled(request.reason, checkpoint=request.checkpoint))
                    poller.unregister(*self._of_node())  # nothing else comes from it, or it is gone
                self._show_life()
        self._end()

    def _end(self) -> None:
        """Raises what `until_end` does."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._handle)
        with contextlib.suppress(Cancelled):
            self._lines.read(self._ctx)  # what it reported just before its end
        self._ctx.command = ended = CommandExit.of(code)
        if self._stopping is not None:
            raise self._stopping
        if ended.signal is not None:
            raise Failed(f"the program was killed by {ended.signal}{self._last_words()}", Fault.CRASH)
        if code != 0:
            words = self._last_words()
            raise Failed(f"the program ended with exit status {code}{words}", _fault(words))

    def _of_node(self) -> list[int]:
        return [] if self._ctx.pipe is None else [self._ctx.pipe.fileno()]

    def _of_caller(self) -> list[int]:
        return [] if self._caller is None else [self._caller.fileno()]

    def _hear(self) -> bool:
        """Pass on the signals of the caller's terminal. False: it is gone."""
        assert self._caller is not None
        try:
            numbers = self._caller.recv(64)
        except OSError:
            numbers = b""
        for number in numbers:
            if number in PASSED_ON:
                self._signal(number)
        return bool(numbers)

    def _show_life(self) -> None:
        """A program that reports nothing shows by its output that it lives."""
        if self._lines.seen or self._logs is None:
            return
        with contextlib.suppress(OSError, Cancelled):
            written = sum((self._logs / f"{name}.log").stat().st_size for name in ("stdout", "stderr"))
            if written != self._written:
                self._written = written
                self._ctx.progress(written, None, "bytes of output")

    def _stop(self, stop: Cancelled) -> None:
        """Ask it to stop; the node kills what is still there when its grace is over."""
        if self._stopping is None:
            self._ctx.log.info("stopping: %s; SIGTERM sent to the program", stop.reason)
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            self._stopping = stop

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, number)

    def _last_words(self) -> str:
        """The last line of its errors, after a colon."""
        lines = [line.strip() for line in tail(self._logs, "stderr").splitlines() if line.strip()]
        return f": {lines[-1][:LAST_LINE_CHARS]}" if lines else ""


def _fault(words: str) -> Fault:
    """What the last line of a program's errors says about its end."""
    if "OutOfMemoryError" in words or "CUDA out of memory" in words:
        return Fault.GPU_OOM
    return Fault.HOST_OOM if "MemoryError" in words.partition(" ")[2].partition(":")[0] else Fault.ERROR


def tail(logs: Path | None, name: str) -> str:
    """The end of an output of the program."""
    if logs is None:
        return ""
    with contextlib.suppress(OSError), (logs / f"{name}.log").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read(TAIL_BYTES).decode(errors="replace")
    return ""


@contextlib.contextmanager
def _terminated() -> Iterator[int]:
    """A descriptor that can be read once a SIGTERM has come, which otherwise has no effect meanwhile."""
    near, far = socket.socketpair()
    far.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    woken = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    try:
        yield near.fileno()
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        near.close()
        far.close()
