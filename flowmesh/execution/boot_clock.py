"""Times that stay correct when the machine's clock is set, also across a restart of the supervisor.

The wall clock may be set by hours at any time. The seconds since boot are never set.
"""

from __future__ import annotations

import datetime
import functools
import time
from pathlib import Path

from loguru import logger

JUMP_S = 60.0
"""Smaller steps of the clock are corrections by NTP, and are followed at once."""
DOUBT_S = 86400.0
"""How long a larger step is ignored."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def mark() -> str:
    """The current time as text: the boot's id, and the seconds since boot, time in suspend included."""
    return f"{_boot_id()} {_since_boot_s():.6f}"


def age_s(marked: str | None, wall: str) -> float:
    """Seconds since a time.

    Args:
        marked: the time, from `mark`; None if it was not recorded.
        wall: the same time by the wall clock, ISO 8601. Used without `marked`, or if the machine was booted since.
    """
    boot_id, _, seconds = (marked or "").partition(" ")
    if boot_id and boot_id == _boot_id():
        return max(0.0, _since_boot_s() - float(seconds))
    began = datetime.datetime.fromisoformat(wall)
    return max(0.0, (datetime.datetime.now(datetime.UTC) - began).total_seconds())


class SteadyClock:
    """The wall clock without its jumps: for decisions, such as removing old results, that a wrong clock must not make.

    A jump is accepted after DOUBT_S. By then a clock that was set wrong has been noticed and corrected. If the new
    setting was right, the old one is used only this much longer.
    """

    def __init__(self) -> None:
        self._ahead_s = _ahead_s()
        self._differs_since: float | None = None

    def now(self) -> datetime.datetime:
        """The current time, UTC; until a jump is accepted, the time as it would be without the jump."""
        if abs(_ahead_s() - self._ahead_s) < JUMP_S:
            self._ahead_s, self._differs_since = _ahead_s(), None
        elif self._differs_since is None:
            self._differs_since = _since_boot_s()
            logger.warning("the machine's clock was set by {:.0f} s", _ahead_s() - self._ahead_s)
        elif _since_boot_s() - self._differs_since >= DOUBT_S:
            self._ahead_s, self._differs_since = _ahead_s(), None
        return datetime.datetime.fromtimestamp(self._ahead_s + _since_boot_s(), datetime.UTC)


def _ahead_s() -> float:
    return time.time() - _since_boot_s()


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@functools.cache
def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
