"""The time limit and cancellation of one run, checked between steps and while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from runners.api import Context
from runners.rag.waiting import POLL_S, patiently

T = TypeVar("T")


class OutOfTime(BaseException):
    """The run exceeded its time limit. Not an Exception, so that no library handles it as a tool's failure."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"timeout: it took more than {timeout_s:g} s")


class Watch:
    """Call `check` between steps and while waiting."""

    def __init__(self, ctx: Context, timeout_s: float | None) -> None:
        self._ctx = ctx
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def check(self) -> None:
        """
        Raises:
            Cancelled: the node asked the task to stop.
            OutOfTime: the run exceeded its time limit.
        """
        self._ctx.check_cancelled()
        if self._deadline is not None and time.monotonic() > self._deadline:
            assert self._timeout_s is not None, "they are set together"
            raise OutOfTime(self._timeout_s)

    def wait(self, call: Callable[[], T]) -> T:
        """The result of a blocking call. Raises what `check` or the call raises."""
        return patiently(self.check, call)

    def sleep(self, seconds: float) -> None:
        """Raises what `check` raises."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, POLL_S))
        self.check()
