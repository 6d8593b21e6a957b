"""Logs of a process that must not wait for whoever reads or stores them: a thread writes, the event loop never does.

A pipe that nobody reads, a stopped terminal or a hung journal would otherwise stop heartbeats and signals with it.
O_NONBLOCK is no way out: it belongs to the open file, which other processes share.
"""

from __future__ import annotations

import copy
import io
import os
import signal
import threading
import time
from collections import deque

from loguru import logger

MOST_BYTES = 4 * 1024**2
"""What waits for a slow reader. Beyond that, new text is dropped and counted."""


RETRY_S = 0.05
_writers: list[LogWriter] = []


def dropped() -> int:
    """Lines that the logs of this process have lost so far."""
    return sum(each.dropped for each in _writers)


class LogWriter(io.TextIOBase):
    """A text stream onto a descriptor. `write` and `flush` return at once.

    Args:
        fd: stays open, and as it is.
        most_bytes: of text that waits.
    """

    def __init__(self, fd: int, most_bytes: int = MOST_BYTES) -> None:
        _writers.append(self)
        self.dropped = 0
        """Writes that were dropped since the start: lines of the log."""
        self._fd = fd
        self._most_bytes = most_bytes
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._unsaid = 0
        """Dropped writes that the reader was not told of."""
        self._changed = threading.Condition()
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), name="log", daemon=True).start()
        ready.wait()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def _put(self, data: bytes) -> bool:
        """Write it, in the thread; False where it is lost."""
        return self._write(data)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._bytes + len(data) > self._most_bytes:
                self.dropped += 1
                self._unsaid += 1
            else:
                self._waiting.append(data)
                self._bytes += len(data)
                self._changed.notify_all()
        return len(text)

    def drain(self, timeout_s: float) -> bool:
        """Wait until all is written; False where it is not within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, timeout_s)

    def _run(self, ready: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # those are for the main thread
        ready.set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting[0]
            lost = not self._put(data)
            with self._changed:
                self._waiting.popleft()
                self._bytes -= len(data)
                self.dropped += lost
                if self._unsaid and not self._waiting:
                    note = f"flowmesh: {self._unsaid} lines of this log were dropped: nobody read them in time\n"
                    self._unsaid = 0
                    self._waiting.append(note.encode())
                    self._bytes += len(note)
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Whether it was written; the reader may be gone, or the disk full."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:  # somebody made it non-blocking, and it is full
                time.sleep(RETRY_S)
            except OSError:
                return False
        return True


class FileWriter(LogWriter):
    """A log file, opened and written by the thread: its disk may be slow, full or gone. Made before handlers are added.

    Args:
        path: as loguru takes it, which rotates it.
        rotation, kept: at which size, and how many old files stay.
    """

    def __init__(self, path: str, *, rotation: str, kept: int) -> None:
        self._file = copy.deepcopy(logger)  # loguru's way to another logger; it has no handlers yet
        self._file.configure(patcher=_nothing)
        self._file.add(
            path,
            format="{message}",
            rotation=rotation,
            retention=kept,
            watch=True,  # opened again where logrotate has moved it away
            delay=True,
            errors="backslashreplace",
        )
        super().__init__(-1)

    def _put(self, data: bytes) -> bool:
        self._file.opt(raw=True).info(data.decode())
        return True


def _nothing(_: object) -> None:
    """The lines are as they should be."""
