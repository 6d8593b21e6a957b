"""A token bucket for uploads, shared by all processes that use the same file.

Its state is one number: the time on the monotonic clock (on Linux the same for all processes) at which all bytes booked
so far have been sent at the set rate. A sender books under a file lock, and sleeps after it has released the lock.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

BURST_S = 0.1
"""How much an idle bucket lets through at once, in seconds of the rate."""
_STALE_S = 60.0  # a booking further ahead than this was made before the last boot
_STATE = struct.Struct("<d")


class Throttle:
    """Limits the rate of the bytes that are passed to `take`; without a rate, `take` returns at once."""

    def __init__(
        self,
        bytes_per_sec: int | None,
        shared: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate = bytes_per_sec
        self._shared = shared
        self._clock = clock
        self._sleep = sleep
        self._booked_until = 0.0
        self._lock = threading.Lock()

    def chunk_bytes(self, at_most: int) -> int:
        """The largest chunk to send at once: small for a slow rate, so that bytes flow steadily."""
        return at_most if self.rate is None else max(1, min(at_most, int(self.rate * BURST_S)))

    def take(self, size: int) -> None:
        """Block until `size` more bytes may be sent."""
        if self.rate is None or size <= 0:
            return
        wait_s = self._book(size / self.rate)
        if wait_s > 0:
            self._sleep(wait_s)

    def _book(self, seconds: float) -> float:
        """Book `seconds` of sending; returns how many seconds to wait first."""
        if self._shared is None:
            with self._lock:
                self._booked_until, wait_s = self._advance(self._booked_until, seconds)
            return wait_s
        fd = os.open(self._shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            raw = os.pread(fd, _STATE.size, 0)
            until = _STATE.unpack(raw)[0] if len(raw) == _STATE.size else 0.0
            until, wait_s = self._advance(until, seconds)
            os.pwrite(fd, _STATE.pack(until), 0)
        finally:
            os.close(fd)
        return wait_s

    def _advance(self, until: float, seconds: float) -> tuple[float, float]:
        now = self._clock()
        if not until - now <= _STALE_S:  # also true for NaN
            until = now
        until = max(until, now - BURST_S)
        until += seconds
        return until, until - now
