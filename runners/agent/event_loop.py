"""An asyncio event loop on a separate thread, for clients whose calls have to be cancelled while they wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from runners.agent.watch import Watch
from runners.rag.waiting import POLL_S

T = TypeVar("T")
CLOSE_S = 10.0


class EventLoop:
    """Starts its thread at the first call. `close` cancels what is left and ends the thread; bounded by CLOSE_S."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def wait(self, coroutine: Coroutine[Any, Any, T], watch: Watch, timeout_s: float | None = None) -> T:
        """The result of a coroutine. It is cancelled, and so are its connections closed, when the caller stops waiting.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            Cancelled, OutOfTime: from `watch`.
            Exception: whatever the coroutine raises.
        """
        future = self.submit(coroutine)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while True:
                watch.check()
                if concurrent.futures.wait([future], POLL_S).done:
                    return future.result()
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"no answer within {timeout_s:g} s")
        finally:
            future.cancel()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop without waiting for it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="event loop", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel all tasks, then end the loop and its thread."""
        if self._loop is None or self._thread is None:
            return
        with contextlib.suppress(TimeoutError):
            self.submit(_cancel_all()).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()
        self._loop = None


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CLOSE_S / 2)
