"""The terminal while the view is on it: alternate screen, single keys, signals. It is restored whatever happens."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Alternate screen and hidden cursor; and back."""
_KEYS = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down",
    b"\x1b[5~": "page-up", b"\x1b[6~": "page-down", b"\x1b[H": "home", b"\x1b[F": "end",
    b"\r": "enter", b"\n": "enter", b"\x1b": "escape",
}  # fmt: skip
_ESCAPE_WAIT_S = 0.03
"""How long the rest of a key's sequence may take to arrive."""


class Terminal:
    """Use as a context manager.

    Args:
        out: a terminal.
        keys: where keys are read from, if it is a terminal; else there are none.
    """

    def __init__(self, out: TextIO, keys: TextIO) -> None:
        self._out = out
        self._keys = keys.fileno() if keys.isatty() else None
        self._before: list[Any] | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._restore = contextlib.ExitStack()
        self.stopped_by: int | None = None
        """The signal that asked to end."""
        self._suspend = False

    @property
    def has_keys(self) -> bool:
        return self._keys is not None

    def __enter__(self) -> Terminal:
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._wake_read)
            undo.callback(os.close, self._wake_write)
            before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                undo.callback(signal.signal, number, signal.signal(number, self._on_stop))
            undo.callback(signal.signal, signal.SIGTSTP, signal.signal(signal.SIGTSTP, self._on_suspend))
            undo.callback(signal.signal, signal.SIGWINCH, signal.signal(signal.SIGWINCH, lambda *_: None))
            undo.callback(self._leave)
            self._enter()
            self._restore = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        try:
            found = os.get_terminal_size(self._out.fileno())
        except OSError:
            return 80, 24
        return found.columns or 80, found.lines or 24

    def draw(self, lines: list[str]) -> None:
        """Replace the screen by these lines, in place: clearing it first would flicker."""
        with contextlib.suppress(OSError):  # the terminal is gone; SIGHUP ends this
            self._out.write("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")
            self._out.flush()

    def wake(self) -> None:
        """End a `wait` in another thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def wait(self, timeout_s: float) -> Iterator[str]:
        """Wait for a key, a signal, a `wake` or the timeout; returns the keys."""
        watched = [self._wake_read] + ([] if self._keys is None else [self._keys])
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        if self._suspend:
            self._suspend = False
            self._leave()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._enter()  # continued
        if self._keys is not None and self._keys in ready:
            yield from self._read()

    def _read(self) -> Iterator[str]:
        assert self._keys is not None
        try:
            data = os.read(self._keys, 1024)
        except OSError:
            data = b""
        if not data:  # the terminal is gone
            self.stopped_by = signal.SIGHUP
            return
        if data == b"\x1b" and select.select([self._keys], [], [], _ESCAPE_WAIT_S)[0]:
            data += os.read(self._keys, 16)
        while data:
            name = next((each for each in sorted(_KEYS, key=len, reverse=True) if data.startswith(each)), None)
            if name is not None:
                yield _KEYS[name]
                data = data[len(name) :]
            else:
                char = data[:1]
                data = data[1:]
                if char.isascii() and char.decode().isprintable():
                    yield char.decode()

    def _enter(self) -> None:
        if self._keys is not None:
            self._before = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys, termios.TCSANOW)
        self._out.write(_ENTER)
        self._out.flush()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            self._out.write(_LEAVE)
            self._out.flush()
        if self._keys is not None and self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._before)

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = number

    def _on_suspend(self, _number: int, _frame: FrameType | None) -> None:
        self._suspend = True
