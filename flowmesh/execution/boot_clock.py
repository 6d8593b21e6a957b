"""When a task began, written so that the supervisor which adopts it can count on from there.

The machine's clock may be set, by hours, while nobody looks; the seconds since its boot are never set.
"""

from __future__ import annotations

import datetime
import functools
import time
from pathlib import Path

from loguru import logger

JUMP_S = 60.0
"""A smaller step is one that NTP makes."""
DOUBT_S = 86400.0

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def mark() -> str:
    """This moment: the boot's own id, and the seconds since then (those that the machine slept included)."""
    return f"{_boot_id()} {_since_boot_s():.6f}"


def age_s(marked: str | None, wall: str) -> float:
    """Seconds since a moment.

    Args:
        marked: it as `mark` wrote it; not used where the machine was booted since, or nobody wrote it.
        wall: it by the machine's clock, ISO 8601.
    """
    boot_id, _, seconds = (marked or "").partition(" ")
    if boot_id and boot_id == _boot_id():
        return max(0.0, _since_boot_s() - float(seconds))
    began = datetime.datetime.fromisoformat(wall)
    return max(0.0, (datetime.datetime.now(datetime.UTC) - began).total_seconds())


class SteadyClock:
    """The machine's clock without its jumps, for what must not be thrown away because of one.

    A jump is believed after `DOUBT_S`: by then somebody has seen a wrong clock, and a right one was not wrong for long.
    """

    def __init__(self) -> None:
        self._ahead_s = _ahead_s()
        self._differs_since: float | None = None

    def now(self) -> datetime.datetime:
        """The time as it was going to be, as long as a jump is in doubt."""
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
