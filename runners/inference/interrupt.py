"""Interrupts the main thread, which waits in a library, when something happens that the library does not notice."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Find = Callable[[threading.Event], Exception | None]
"""Waits a moment, or until the event is set; returns what is raised into the body, or None: nothing has happened."""


@contextlib.contextmanager
def interrupted(number: int, find: Find) -> Iterator[None]:
    """Run the body, and raise into it what `find` returns. Call it on the main thread.

    Args:
        number: the signal that interrupts; bodies within each other need different ones.
        find: called again and again, in a thread.
    """
    over = threading.Event()
    found: list[Exception] = []

    def watch() -> None:
        while not over.is_set():
            if (error := find(over)) is not None:
                found.append(error)
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise found[0]

    before = signal.signal(number, stop)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(number, before)
