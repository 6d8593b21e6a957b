"""`node.ends_at`: a point in time, written as ISO 8601 or as seconds since 1970."""

from __future__ import annotations

import datetime
import math

SLURM_END = "SLURM_JOB_END_TIME"
"""When a Slurm job ends, in seconds since 1970. Counts where node.ends_at is not set. Slurm before 23.02 has none."""
LATEST = 4_102_444_800.0
"""The year 2100. Slurm's word for no end is later."""


def moment(value: float | str) -> float:
    """Seconds since 1970.

    Args:
        value: these, as a number or as text; or ISO 8601, in local time where it names no zone.

    Raises:
        ValueError: it is neither.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = datetime.datetime.fromisoformat(str(value)).timestamp()
        except (ValueError, OverflowError, OSError):
            seconds = math.nan
    if not 0 < seconds <= LATEST:
        raise ValueError(f"expected a time such as 2026-12-01T18:00:00Z, or seconds since 1970, found {value!r}")
    return seconds


def iso(seconds: float) -> str:
    """The same as ISO 8601, UTC, to the second."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
